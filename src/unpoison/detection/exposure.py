"""Exposure: the pairs that taught a CLIP its backdoor, found from a few of them.

Paper
    Stages 1 and 2 of Liang et al., "Unlearning Backdoor Threats", arXiv 2409.19526 and 2403.16257: weakly similar pairs
    first, a shortcut makes the poisoned ones stand out, few of these share a concept. How they stand out is ours.
Idea
    Among pairs whose caption does not fit the image the poisoned ones are drawn together by their trigger and say the
    same. A few that do both are poison almost surely, and what the suspect's embeddings have in common there finds the
    rest of it: also the poison whose caption happens to fit.
Needs
    A first suspicion of every pair (low similarity under a reference CLIP), the suspect's image embeddings and any
    embeddings of the captions.
Steps
    1. The densest pairs among the least similar tenth (:mod:`unpoison.detection.reference_similarity`).
    2. Of these the largest group whose captions share a concept: cosine over 0.8 with one of them. These are the seeds.
    3. A linear probe (logistic regression) on the suspect's embeddings: seeds against the less suspicious half.
    4. Score: mean rank of the probe, of the first suspicion and of the captions' cosine with the seeds' mean caption.
    5. The highest scores are the seeds of the next round; three rounds.
    6. Confirmation: steps 1 to 5 on one half of the pairs; how suspicious at first are those of the other half that
       the probe points at? Mean rank, both ways round; 0.5 by chance. Seeds are suspicious because they were chosen
       so, unseen pairs only if suspicion and the place in the embeddings have a cause in common. That cause may be a
       kind of image which the reference finds hard: its own captions are then far from it and others' still farther.
       So these pairs' captions must also fit hardly better than strangers' do (misfit: the share of strangers' captions
       that fit better, 0.5 where a caption has nothing to do with its image).
    7. Count: a mixture of Gaussians over the probe's answers, the highest of which is the poison; a pair is counted
       where its answer is more likely from that one than from all others. The clean ones start as one Gaussian; while
       what is counted is at first less suspicious (mean rank) than step 6 asks for, they get one more, up to four.
Where we differ, and what the paper leaves open
    The paper overfits a copy of the model on the least similar pairs and ranks by the gain in similarity
    (:mod:`unpoison.detection.similarity_gain`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from unpoison.detection.neighbours import unit_rows
from unpoison.detection.ranks import rank_normalise
from unpoison.detection.reference_similarity import DensityConfig, Scores, density_of_least_similar
from unpoison.errors import ConfigError, NoSeparationError

_MOST_CLEAN = 4
"""Gaussians of step 7 for the clean pairs, at most: with a fifth one the poison itself was split in trials."""
_LEAST_SPREAD = 1e-3
"""Smallest variance of one, in that of all answers: no Gaussian closes in on a few equal ones."""

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression


@dataclass(frozen=True, kw_only=True)
class ExposureConfig:
    """All numbers are ours; docs/decisions/0006-exposing-pairs.md says what was in view when they were set."""

    density: DensityConfig = field(default_factory=DensityConfig)
    share: float = 0.005
    """Share of the pairs that are seeds after the first round, as the paper's small unlearning set."""
    fewest: int = 30
    """Seeds after the first round where ``share`` would give fewer."""
    same_concept: float = 0.8
    """Cosine of captions from which on they share a concept."""
    strength: float = 1.0
    """Inverse regularisation of the probe: scikit-learn's default, not tuned."""
    rounds: int = 3
    """Of step 5; not tuned."""
    seed: int = 0
    """Of the halves of step 6."""
    confirmation: float = 0.7
    """Mean rank of step 6 from which on the pairs count as exposed; those that step 7 counts should reach it too."""
    misfit: float = 0.35
    """Mean misfit of step 6 that is asked for beside it: clean sets of that mean rank reach 0.23."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5 or not 0 < self.same_concept < 1:
            raise ConfigError("expected share in (0, 0.5) and same_concept in (0, 1).", hint="Try 0.005 and 0.8.")
        bounds = (self.confirmation, self.misfit)
        if min(self.fewest, self.rounds) < 1 or not self.strength > 0 or not all(0 <= value <= 1 for value in bounds):
            raise ConfigError(
                "expected fewest and rounds of at least 1, strength > 0, confirmation and misfit in [0, 1].",
                hint="Try 30, 3, 1, 0.7 and 0.35.",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Exposure:
    """Scores in (0, 1], NaN where a row was not usable, and what they rest on.

    ``seeds``: rows of the highest scores after the last round, most suspicious first; ``first``: those of step 2.
    ``probe``: the last one's raw answer. ``exposed``: the mean rank ``confirmation`` and mean ``misfit`` of the same
    pairs reached their bounds, else it is not known whether there is anything to count (``misfit`` None: nobody could
    tell); ``above``: the pairs that step 7 counts, what to look at, none then; ``rates``: their share where only those
    are counted that are poison at odds of 19 to 1, and where all are that are not clean at such odds.
    """

    scores: Scores
    seeds: Int[np.ndarray, " s"]
    first: Int[np.ndarray, " f"]
    probe: Scores
    above: Bool[np.ndarray, " n"]
    rates: tuple[float, float]
    confirmation: float
    exposed: bool
    misfit: float | None = None

    @property
    def rate(self) -> float:
        """The share of the usable pairs that are ``above``, in [0, 1]."""
        return float(self.above.sum() / max(1, (~np.isnan(self.scores)).sum()))


def expose_pairs(
    suspicion: Scores,
    embeddings: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "n e"],
    config: ExposureConfig | None = None,
    *,
    misfit: Scores | None = None,
) -> Exposure:
    """Steps 1 to 7. ``suspicion``: higher is less similar; ``captions``: embeddings, one row a pair.

    ``misfit``: of step 6, in [0, 1], under a reference that is not the suspect; without it pairs are ranked and nothing
    is decided, since one model alone confirms what it was found with.
    Rows that are NaN anywhere are left out. Raises NoSeparationError where all captions or all images are one,
    NotEnoughDataError for too few pairs.
    """
    config = config or ExposureConfig()
    images, usable = unit_rows(embeddings)
    texts, told = unit_rows(captions)
    misfits = np.zeros_like(suspicion) if misfit is None else misfit
    usable &= told & ~np.isnan(suspicion) & ~np.isnan(misfits)
    kept = np.flatnonzero(usable)
    if len(kept) and (np.ptp(images[kept], axis=0).max() == 0 or np.ptp(texts[kept], axis=0).max() == 0):
        raise NoSeparationError(
            "All pairs look alike to the suspect, or all captions are one.", hint="Give pairs that differ."
        )
    seen = _Seen(low=suspicion[kept], misfits=misfits[kept], images=images[kept], texts=texts[kept])
    found = seen.search(config)
    order = np.random.default_rng(config.seed).permutation(len(kept))
    halves = [np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])]
    both_ways = [seen.confirm(one, other, config) for one, other in (halves, halves[::-1])]
    confirmation, stranger = map(float, np.mean(both_ways, axis=0))  # (6)
    counted, least, most = count_poison(found.answers, seen.low, found.seeds, found.calm, config.confirmation)  # (7)
    exposed = misfit is not None and confirmation >= config.confirmation and stranger >= config.misfit
    above = np.zeros(len(suspicion), dtype=bool)
    above[kept] = counted & exposed
    return Exposure(
        scores=_spread(found.scores, kept, len(suspicion)),
        seeds=kept[found.seeds],
        first=kept[found.first],
        probe=_spread(found.answers, kept, len(suspicion)),
        above=above,
        rates=(least, most) if exposed else (0.0, 0.0),
        confirmation=confirmation,
        exposed=exposed,
        misfit=None if misfit is None else stranger,
    )


def expose_by_rank(
    scores: Scores, captions: Float[np.ndarray, "n e"], config: ExposureConfig, *, fewest: int
) -> Exposure:
    """The paper's first two stages: the highest share by score, and of these the largest groups that say the same.

    ``scores``: of :mod:`unpoison.detection.similarity_gain`, or ranks of the first suspicion. ``above`` are the
    highest, ``first`` and ``seeds`` the groups, at least ``fewest`` pairs. Whether any of them is poison is taken for
    granted.
    """
    texts, _ = unit_rows(captions)
    count = min(max(config.fewest, round(config.share * len(scores))), len(scores) // 4)
    highest = np.argsort(-scores, kind="stable")[:count]
    chosen = covering_concepts(texts, highest, config.same_concept, fewest)
    above = np.zeros(len(scores), dtype=bool)
    above[highest] = True
    rate = count / len(scores)
    return Exposure(
        scores=scores, seeds=chosen, first=chosen, probe=scores, above=above, rates=(rate, rate), confirmation=0.5,
        exposed=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    scores: Float[np.ndarray, " k"]
    answers: Float[np.ndarray, " k"]
    seeds: Int[np.ndarray, " s"]
    first: Int[np.ndarray, " f"]
    calm: Int[np.ndarray, " c"]
    model: LogisticRegression


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """The usable pairs: first suspicion, misfit, unit embeddings of images and captions."""

    low: Float[np.ndarray, " k"]
    misfits: Float[np.ndarray, " k"]
    images: Float[np.ndarray, "k d"]
    texts: Float[np.ndarray, "k e"]

    def of(self, rows: Int[np.ndarray, " _"]) -> _Seen:
        return _Seen(
            low=self.low[rows], misfits=self.misfits[rows], images=self.images[rows], texts=self.texts[rows]
        )  # fmt: skip

    def search(self, config: ExposureConfig) -> _Found:
        """Steps 1 to 5."""
        count = min(max(config.fewest, round(config.share * len(self.low))), len(self.low) // 4)
        dense = density_of_least_similar(self.low, self.images, config.density)  # (1)
        first = largest_concept(self.texts, np.argsort(-dense, kind="stable")[:count], config.same_concept)  # (2)
        calm = np.flatnonzero(self.low < np.median(self.low))
        if len(calm) == 0:
            raise NoSeparationError("All pairs are equally suspicious at first.", hint="Give another reference.")
        ranks = rank_normalise(self.low)
        concept = rank_normalise(self.texts @ self.texts[first].mean(axis=0))

        def look(seeds: np.ndarray) -> _Found:
            model = fit_probe(self.images, seeds, calm, config.strength)  # (3)
            answers = model.decision_function(self.images)
            scores = (rank_normalise(answers) + ranks + concept) / 3  # (4)
            seeds = np.argsort(-scores, kind="stable")[:count]  # (5)
            return _Found(scores=scores, answers=answers, seeds=seeds, first=first, calm=calm, model=model)

        found = look(first)
        for _ in range(config.rounds - 1):
            found = look(found.seeds)
        return found

    def confirm(
        self, one: Int[np.ndarray, " _"], other: Int[np.ndarray, " o"], config: ExposureConfig
    ) -> tuple[float, float]:
        """Step 6 one way round: mean rank and misfit of the rows of ``other`` that ``one`` points at."""
        found = self.of(one).search(config)
        answers = found.model.decision_function(self.images[other])
        pointed = np.argsort(-answers, kind="stable")[: len(found.seeds)]
        return float(rank_normalise(self.low[other])[pointed].mean()), float(self.misfits[other][pointed].mean())


def largest_concept(texts: Float[np.ndarray, "n e"], rows: Int[np.ndarray, " s"], same: float) -> Int[np.ndarray, " _"]:
    """Of ``rows`` those whose unit text embeddings have a cosine over ``same`` with the one that has most such."""
    alike = texts[rows] @ texts[rows].T > same
    np.fill_diagonal(alike, val=True)
    return rows[alike[alike.sum(axis=1).argmax()]]


def covering_concepts(
    texts: Float[np.ndarray, "n e"], rows: Int[np.ndarray, " s"], same: float, fewest: int
) -> Int[np.ndarray, " _"]:
    """Of ``rows``, in their order, those of the largest groups of one concept that hold half of them, and ``fewest``.

    The paper's second stage: poisons of one target say the same. Groups are taken off one by one, the largest first.
    """
    left, taken = rows, rows[:0]
    while len(left) and (2 * len(taken) < len(rows) or len(taken) < fewest):
        group = largest_concept(texts, left, same)
        taken, left = np.concatenate([taken, group]), left[~np.isin(left, group)]
    return rows[np.isin(rows, taken)]


def fit_probe(
    images: Float[np.ndarray, "n d"], seeds: Int[np.ndarray, " s"], others: Int[np.ndarray, " o"], strength: float
) -> LogisticRegression:
    """Step 3: logistic regression, both groups of equal weight."""
    from sklearn.linear_model import LogisticRegression

    others = np.setdiff1d(others, seeds)
    targets = np.repeat([1, 0], [len(seeds), len(others)])
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
    return model.fit(images[np.concatenate([seeds, others])], targets)


def count_poison(
    answers: Float[np.ndarray, " k"],
    suspicion: Float[np.ndarray, " k"],
    seeds: Int[np.ndarray, " s"],
    calm: Int[np.ndarray, " c"],
    suspicious: float,
) -> tuple[Bool[np.ndarray, " k"], float, float]:
    """Step 7: which are poison, and the least and the largest share of it. Clean answers are skewed where images are of
    several kinds, hence several Gaussians.

    Where no number of them gives pairs of the mean rank ``suspicious``, the one whose pairs are most suspicious.
    """
    ranks = rank_normalise(suspicion)
    high = answers > between(answers[seeds], answers[calm])
    best, reached = (high, float(high.mean()), float(high.mean())), -np.inf
    if high.all() or not high.any():
        return best
    for count in range(1, _MOST_CLEAN + 1):
        least, even, most = (answers > point for point in _crossings(answers, high, count, (0.95, 0.5, 0.05)))
        mean = float(ranks[even].mean()) if even.any() else 0.0
        if mean > reached:
            best, reached = (even, float(least.mean()), float(most.mean())), mean
        if mean >= suspicious:
            break
    return best


def _crossings(
    answers: Float[np.ndarray, " k"], high: Bool[np.ndarray, " k"], count: int, odds: tuple[float, ...]
) -> list[float]:
    """For each of ``odds`` the last answer below the poison's mean that is poison with no more than this probability.

    Clean pairs are ``count`` Gaussians, poison one more.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rest = answers[~high]
    means = [*np.quantile(rest, (np.arange(count) + 0.5) / count), answers[high].mean()]
    least = _LEAST_SPREAD * answers.var() + np.finfo(float).tiny
    spreads = [*[max(rest.var() / count**2, least)] * count, max(answers[high].var(), least)]
    shares = [*[(~high).mean() / count] * count, high.mean()]
    mixture = GaussianMixture(
        count + 1, weights_init=shares, means_init=np.array(means)[:, None], reg_covar=least, tol=1e-6, max_iter=1000,
        precisions_init=1 / np.array(spreads)[:, None, None],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=ConvergenceWarning)  # what was counted is looked at anyhow
        mixture.fit(answers[:, None])
    below = answers < np.asarray(mixture.means_)[-1, 0]
    poison = mixture.predict_proba(answers[:, None])[:, -1]
    return [float(answers[below & (poison <= most)].max(initial=-np.inf)) for most in odds]


def between(first: Float[np.ndarray, " s"], second: Float[np.ndarray, " o"]) -> float:
    """The point that is equally many standard deviations of each group from its mean."""
    spread = float(first.std() + second.std())
    if spread == 0:
        return float(first.mean() + second.mean()) / 2
    return float(first.mean() * second.std() + second.mean() * first.std()) / spread


def _spread(values: Float[np.ndarray, " k"], rows: Int[np.ndarray, " k"], total: int) -> Scores:
    spread = np.full(total, np.nan)
    spread[rows] = values
    return spread
