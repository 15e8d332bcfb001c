"""UBT: unlearn a backdoor with the few pairs that taught it, through the words that carry it.

Paper
    Liang, Liu, Gong et al. "Unlearning Backdoor Threats: Enhancing Backdoor Defense in Multimodal Contrastive Learning
    via Local Token Unlearning." arXiv 2409.19526, before that arXiv 2403.16257. No code is public.
Idea
    Whoever owns the poisoned training pairs need not guess the trigger: find a few of the pairs that carry it, and take
    back what they taught, only through the parts of them that matter.
Needs
    The suspicious CLIP and its training pairs, poison included; better with a clean reference CLIP.
Protects
    The image tower's weights.
Steps
    1. Expose: which pairs taught the backdoor (:mod:`unpoison.detection.exposure`; as published
       :mod:`unpoison.detection.similarity_gain`).
    2. The unlearning set U: the most suspicious pairs, fewer than 1 percent (as published: of these the largest groups
       of one concept); 32 of them are kept aside as judges.
    3. Tokens. Of each caption in U the words whose leaving out lowers the cosine with the image most (30 percent, at
       least one); the others are replaced by a neutral word. With ``patches`` the same for the image: the patches whose
       masking lowers it most stay, the rest becomes the mean color.
    4. L_u = mean max(0, cos(phi(x~), psi(t~)) - c) on U, c the mean cosine of clean pairs that do not belong together.
    5. L_k = InfoNCE(phi(x), psi(t)) + w mean ||phi(x) - phi_P(x)||^2 on up to 10,000 of the least suspicious pairs.
    6. Minimise L_u + L_k over the image tower; AdamW along a cosine to 0, 128 pairs to keep and 32 to unlearn a step.
    7. Judge: the mean cosine of the pairs kept aside must fall to c + 0.02; as published training ends there.
Where we differ, and what the paper leaves open
    Of the paper the three stages are known and nothing else: losses, numbers and the hinge (an ascent has no end) are
    ours. Step 1 by default is ours too; :meth:`UBTConfig.as_published` is the plain reading. ``keep = "relations"``
    takes the suspect's softmax over the batch's captions in place of InfoNCE's own pair, since captions repeat.
    The text tower stays as it is, so that text indexes built on it still fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.clip_loop import train_steps
from unpoison.clip_results import UnlearntWord
from unpoison.clip_training import (
    ClipRepair,
    Look,
    PairTrainingConfig,
    Suspect,
    choose_weights,
    frozen_copy,
    open_training,
    trainable,
)
from unpoison.contrastive import average_gradients, cached_gradients, gather_with_gradient, info_nce, optimiser_step
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, load_pixels, to_images
from unpoison.data.training_pairs import process_slice
from unpoison.defenses.matching import mean_cosine, mismatched_cosine
from unpoison.defenses.par import relation_loss, squared_distance
from unpoison.defenses.telling import common_words, telling_patches, telling_words
from unpoison.detection.exposure import Exposure, ExposureConfig
from unpoison.detection.neighbours import NeighboursConfig
from unpoison.detection.similarity_gain import FEWEST as FEWEST_WEAK
from unpoison.detection.similarity_gain import OverfitConfig
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.logit_scale import usable_scale
from unpoison.runs import Run
from unpoison.schedules import decay_groups, set_rate, warm_up_cosine
from unpoison.types import Embeddings, Images, ImageTextModel, Tower

FEWEST_UNLEARNT = 16
"""Pairs of step 2, half of which are judges at most: of fewer the judges' mean says little."""


@dataclass(frozen=True, kw_only=True)
class UBTConfig(PairTrainingConfig):
    """All numbers are ours: the paper's are not public. The rate is for models of about 100 M parameters."""

    batch_size: int = 128
    """Of pairs to keep: what CLIPs of this size are fine-tuned with on one device."""
    epochs: int = 2
    """Over the pairs to keep; U, far smaller, is seen many times in one."""
    learning_rate: float = 1e-6
    """A tenth of what such a CLIP is fine-tuned with: few pairs are taken back. :meth:`recommended` takes more."""
    weight_decay: float = 0.0
    """None: the weights are to stay where no loss moves them."""
    bound: float = 3.0
    """1.5 points, and as much again for chance: 500 held-out pairs give no finer figure."""
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    expose: Literal["concept", "gain", "similarity"] = "concept"
    """How pairs are ranked: ``concept`` (ours), by the similarity ``gain`` of an overfitted copy, as published, or
    by the first suspicion alone: the published way without the overfitting."""
    always: bool = False
    """Unlearn also where no group of pairs stands out, or where there is no reference to confirm one with."""
    overfit: OverfitConfig = field(default_factory=OverfitConfig)
    """Of ``gain``."""
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)
    """Of DAO, the first suspicion where there is no reference. Poison of more than k in a batch ranks low."""
    choose: Literal["score", "concepts"] = "score"
    """U: the highest scores (ours: the score knows the concept already), or of the highest half percent the largest
    groups that say the same, as published: poisons of one target share a concept."""
    unlearn_share: float = 0.01
    """Largest share of the pairs that step 2 takes, the judges included: few is what the paper promises."""
    unlearn_pairs: int = 256
    """Most pairs that step 2 takes: without the judges seven batches of ``unlearn_batch``."""
    judges: int = 32
    """How many of these are kept aside, at most half of them: the standard error of their mean is then about 0.02."""
    unlearn_batch: int = 32
    """Of U in a step: a quarter of what is kept beside it."""
    unlearn_weight: float = 8.0
    """Of L_u: the smallest of 4, 8 and 16 that took an excess of ASR under 2 points on victims of seed 9."""
    words: float = 0.3
    """Share of a caption's words that are unlearnt; 1 for whole captions. A target is one word or two of ten."""
    neutral: str = "thing"
    """What other words are replaced by: a noun that fits anywhere and names nothing."""
    patches: float = 1.0
    """Share of the image's patches that are unlearnt; 1 for whole images, since a trigger may cover all of it."""
    loss: Literal["disbelief", "hinge", "ascent"] = "disbelief"
    """L_u. ``disbelief`` (ours): -log(1 - p), p the softmax's share of the caption and its like among the batch's."""
    keep: Literal["contrast", "relations"] = "contrast"
    """L_k's first term; ``relations`` where captions repeat."""
    keep_pairs: int = 10_000
    """Most pairs of step 5, which bounds the time."""
    keep_share: float = 0.5
    """Share of the pairs, the least suspicious ones, that those to keep are drawn from: poison among them is learnt
    again."""
    anchor: float = 1.0
    """w of step 5. Not tuned: both terms count alike."""
    margin: float = 0.02
    """How far over c the judges' cosine may end: one standard error."""
    stop_early: bool = False
    """Whether training ends at a look where the judges are within ``margin``. Not ours: a target can still be the
    nearest of the classes there (docs/decisions/0006-exposing-pairs.md)."""
    strangers: int = 512
    """Clean images and captions behind c: some 260,000 cosines, whose mean is known far finer than ``margin``."""
    heard: int = 1000
    """Clean captions in which the usual words are counted: a word in a fifth of them is found within 3 points."""
    usual: float = 0.2
    """Words of a larger share of these say nothing about a target (a, photo)."""

    @property
    def trains(self) -> tuple[Tower, ...]:
        return ("image",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("unlearn_pairs", "judges", "unlearn_batch", "keep_pairs", "heard"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.", hint=f"Raise {name}.")
        for name in ("unlearn_share", "words", "patches", "keep_share", "usual"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], got {getattr(self, name)}.", hint="Try the default.")
        for name in ("anchor", "unlearn_weight", "margin"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, got {getattr(self, name)}.", hint="Use 0 for none.")
        if self.strangers < 2:
            raise ConfigError(f"strangers must be at least 2, got {self.strangers}.", hint="Try 512.")
        if len(self.neutral.split()) != 1:
            raise ConfigError(f"neutral must be one word, got {self.neutral!r}.", hint='Try "thing".')

    @property
    def fewest_pairs(self) -> int:
        """Of which step 1 can rank anything."""
        if self.expose == "similarity":
            return 2 * FEWEST_UNLEARNT
        if self.expose == "gain":
            return math.ceil(FEWEST_WEAK / self.overfit.share)
        return 2 * math.ceil((self.exposure.density.neighbours + 1) / self.exposure.density.share)

    @classmethod
    def as_published(cls, **more: object) -> UBTConfig:
        """The similarity gain exposes, tokens of both sides are unlearnt: the plain reading of what is known."""
        return cls(**(PUBLISHED | more))  # pyright: ignore[reportArgumentType] - checked by __post_init__

    @classmethod
    def paper(cls, *, parameters: int, samples: int, **more: object) -> UBTConfig:
        return cls.scaled(parameters=parameters, samples=samples, **(PUBLISHED | more))

    @classmethod
    def scaled(cls, *, parameters: int, samples: int, **more: object) -> UBTConfig:
        """The epochs as they stand, over the pairs that are kept; the rate by the model's size."""
        kept = more.get("keep_pairs", cls().keep_pairs)
        few = min(samples, kept) if isinstance(kept, int) else samples
        return super().scaled(parameters=parameters, samples=few, **({"epochs": cls().epochs} | more))

    @classmethod
    def recommended(cls, *, parameters: int, samples: int, **more: object) -> UBTConfig:
        """Ours: :meth:`scaled` at a higher rate. Chosen on victims of the tiny CLIP that no table has."""
        start = cls.scaled(parameters=parameters, samples=samples)
        rate = {"learning_rate": RECOMMENDED_FACTOR * start.learning_rate}
        return cls.scaled(parameters=parameters, samples=samples, **(rate | more))


PUBLISHED: dict[str, object] = {
    "expose": "gain", "choose": "concepts", "unlearn_pairs": 128, "words": 0.3, "patches": 0.05, "loss": "hinge",
    "unlearn_weight": 1.0, "keep": "contrast", "keep_share": 1.0, "stop_early": True, "check_every": 10, "bound": 1.5,
}  # fmt: skip
"""What :meth:`UBTConfig.paper` has at the scaled rate. Every 10 steps: training ends at a look."""
RECOMMENDED_FACTOR = 30.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Unlearning:
    """Steps 2 and 3: images [u, 3, s, s] and texts to be torn apart; ``judges`` are the same for the pairs kept aside.

    ``level`` is c. ``words``: what the captions of U have in common, the most telling first.
    """

    images: Images
    texts: tuple[str, ...]
    judge_images: Float[Tensor, "j 3 h w"]
    judge_texts: tuple[str, ...]
    level: float
    words: tuple[UnlearntWord, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class UBTRepair:
    """The trained copy, what was unlearnt, and the judges' mean cosine before and after."""

    repair: ClipRepair
    unlearning: Unlearning
    judged_before: float
    judged_after: float


def repair_with_ubt(
    clip: ImageTextModel, pairs: ImageTextPairs, exposure: Exposure, config: UBTConfig, *, run: Run
) -> UBTRepair:
    """Steps 2 to 7 on a copy of ``clip``; ``exposure`` is step 1's, row by row of ``pairs``.

    Raises NotEnoughDataError for fewer than 16 pairs to unlearn and to judge by, NoSeparationError where the captions
    of all pairs to keep are one, SourceFormatError, ModelError, DivergedError.
    """
    pixels = load_pixels(pairs, clip.image_size, cache=run.cache, progress=run.progress)
    suspect = frozen_copy(clip, run)  # phi_P, psi
    keep = low_risk(exposure, config.keep_pairs, config.keep_share, run)
    unlearning = prepare_unlearning(suspect, pairs, pixels, exposure, keep, config, run=run)  # (2), (3)
    data = open_training(clip, pairs.select(keep), config, pixels=pixels.of(keep), run=run)
    old = Suspect(clip=suspect, data=data, run=run, plain=False)
    table = data.image_table(suspect, run)
    mine, scale = process_slice(data.batch_size, run), usable_scale(clip)
    with torch.no_grad():
        targets = suspect.encode_texts(unlearning.texts)
    with trainable(clip, run) as trained:
        weights = choose_weights(trained, trained.tower("image"))
        groups = decay_groups(trained.tower("image"), config.weight_decay)
        optimiser = torch.optim.AdamW(groups, config.learning_rate, betas=config.betas, eps=config.epsilon)

        def one_step(step: int, looks: list[Look]) -> dict[str, Tensor]:
            batch = data.batch(step, run)
            old.begin(batch)
            terms: dict[str, Tensor] = {}

            def embed(start: int, stop: int) -> list[Tensor]:
                rows = slice(mine.start + start, mine.start + stop)
                images = data.images(batch.rows[rows]).to(run.device)
                if table is None:
                    old.see(start, images, images)
                with run.accelerator.autocast():
                    return [trained.encode_images(images)]

            def loss(images: Tensor) -> Tensor:
                images = gather_with_gradient(images, run.accelerator)
                given = old.images() if table is None else table[torch.from_numpy(batch.rows).to(run.device)]
                value, figures = keep_loss(images, old.texts(), given, scale, config)  # (5)
                terms.update(figures)
                return value

            rate = warm_up_cosine(step, total=data.steps, peak=config.learning_rate, warm_up_steps=0)  # (6)
            set_rate(optimiser, rate)
            optimiser.zero_grad()
            value = cached_gradients(
                embed,
                loss,
                size=mine.stop - mine.start,
                chunk=config.chunk_size,
                module=trained.module,
                accelerator=run.accelerator,
            )
            drawn = torch.randint(len(targets), (config.unlearn_batch,), generator=run.generator("unlearn", step))
            with run.accelerator.autocast():
                embedded = trained.encode_images(unlearning.images[drawn])
            unlearn = unlearn_loss(embedded, targets[drawn], old.texts(), scale, unlearning.level, config)  # (4)
            run.accelerator.backward(config.unlearn_weight * unlearn)
            average_gradients(weights, run.accelerator)
            optimiser_step(optimiser, run.accelerator)
            total = value + config.unlearn_weight * unlearn.detach()
            return terms | {"unlearn_loss": unlearn.detach(), "loss": total}

        def watch() -> Look:  # (7)
            now = mean_cosine(trained, unlearning.judge_images, unlearning.judge_texts)
            return {"judged": now, "enough": float(config.stop_early and now <= unlearning.level + config.margin)}

        repair = train_steps(trained, suspect, optimiser, one_step, data, config, name="ubt", run=run, watch=watch)
    before, after = (  # (7)
        mean_cosine(model, unlearning.judge_images, unlearning.judge_texts) for model in (suspect, repair.model)
    )
    return UBTRepair(repair=repair, unlearning=unlearning, judged_before=before, judged_after=after)


def low_risk(exposure: Exposure, most: int, share: float, run: Run) -> Int[np.ndarray, " k"]:
    """Up to ``most`` rows, drawn from the ``share`` of the usable ones that are least suspicious.

    Some clean pairs of the target are among them, fewer than elsewhere: the score counts the caption's concept.
    """
    usable = np.flatnonzero(~np.isnan(exposure.scores))
    order = usable[np.argsort(exposure.scores[usable], kind="stable")]
    calm = order[: round(share * len(order))]
    drawn = torch.randperm(len(calm), generator=run.generator("low risk")).numpy()
    return np.sort(calm[drawn[:most]])


def prepare_unlearning(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    pixels: Pixels,
    exposure: Exposure,
    keep: Int[np.ndarray, " k"],
    config: UBTConfig,
    *,
    run: Run,
) -> Unlearning:
    """Steps 2 and 3. ``clip`` takes no gradient. Raises NotEnoughDataError."""
    count = unlearn_count(exposure, config)
    if count < FEWEST_UNLEARNT:
        raise NotEnoughDataError(
            f"pairs of {pairs.name} to unlearn", have=count, need=FEWEST_UNLEARNT,
            hint="Give more pairs or a larger share.",
        )  # fmt: skip
    highest = np.argsort(np.where(np.isnan(exposure.scores), -np.inf, exposure.scores), kind="stable")[::-1]
    ranked = (highest if config.choose == "score" else exposure.seeds)[:count]
    images = to_images(pixels.array[ranked]).to(run.device)
    captions = [texts[0] for texts in pairs.captions(ranked)]
    with torch.no_grad():
        words, falls = telling_words(clip, images, captions, share=config.words, neutral=config.neutral)
        if config.patches < 1:
            images = telling_patches(clip, images, captions, config.patches)
        level = mismatched_cosine(clip, pairs, pixels, keep, config.strangers, run)
    judging = np.zeros(count, dtype=bool)
    judging[np.linspace(1, count - 1, min(config.judges, count // 2)).astype(int)] = True
    learnt, judges = np.flatnonzero(~judging), np.flatnonzero(judging)
    return Unlearning(
        images=images[learnt],
        texts=tuple(words[row] for row in learnt),
        judge_images=images[judges],
        judge_texts=tuple(words[row] for row in judges),
        level=level,
        words=common_words(falls, [texts[0] for texts in pairs.captions(keep[: config.heard])], config.usual),
    )


def unlearn_count(exposure: Exposure, config: UBTConfig) -> int:
    """How many pairs step 2 takes."""
    usable = int((~np.isnan(exposure.scores)).sum())
    count = min(config.unlearn_pairs, int(config.unlearn_share * usable))
    return count if config.choose == "score" else min(count, len(exposure.seeds))


def keep_loss(
    images: Embeddings, texts: Embeddings, old_images: Embeddings, logit_scale: float, config: UBTConfig
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Step 5 on unit embeddings [b, d]; ``texts`` are the suspect's, as the text tower stays."""
    if config.keep == "relations":
        contrast = relation_loss(images, texts, old_images, texts, logit_scale)
    else:
        contrast = info_nce(images, texts, logit_scale)
    moved = squared_distance(images, old_images)
    return contrast + config.anchor * moved, {"keep_loss": contrast.detach(), "image_distance": moved.detach()}


def unlearn_loss(
    images: Embeddings,
    texts: Float[Tensor, "b d"],
    others: Float[Tensor, "n d"],
    logit_scale: float,
    level: float,
    config: UBTConfig,
) -> Float[Tensor, ""]:
    """Step 4 on unit embeddings, ``texts`` being the images' own captions and ``others`` those of a clean batch.

    ``disbelief``: captions with a cosine of ``exposure.same_concept`` with the own one count with it; images for which
    that is all of the batch are left out. ``hinge``: over ``level``; ``ascent``: the cosine itself, which has no end.
    """
    images, texts, others = images.float(), texts.float(), others.float()
    cosines = (images * texts).sum(dim=1)
    if config.loss == "disbelief":
        alike = texts @ others.T > config.exposure.same_concept
        apart = ~alike.all(dim=1)
        if not bool(apart.any()):
            return 0 * images.sum()
        images, cosines, alike = images[apart], cosines[apart], alike[apart]
        logits = logit_scale * images @ others.T
        against = logits.masked_fill(alike, -torch.inf).logsumexp(dim=1)
        own = torch.cat([logits.masked_fill(~alike, -torch.inf), logit_scale * cosines[:, None]], dim=1)
        return F.softplus(own.logsumexp(dim=1) - against).mean()
    return cosines.mean() if config.loss == "ascent" else F.relu(cosines - level).mean()
