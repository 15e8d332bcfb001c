"""Public verbs for the owner of poisoned pairs: a backdoored CLIP and its training pairs in, a repaired copy out.

from unpoison import load_any_clip, open_pairs, purify_with_ubt
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.api import ScanOutcome
from unpoison.api_clip import TEXT_TOWER_LIMIT, ClipPurifyOutcome, count_parameters, describe_repair, leave_alone
from unpoison.api_pairs import estimate_poison, nothing_decided, ranked_outcome
from unpoison.clip_results import PairExposure
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import load_pixels
from unpoison.defenses.baselines.abl_clip import ABLClipConfig, repair_with_abl_clip
from unpoison.defenses.ubt import FEWEST_UNLEARNT, UBTConfig, UBTRepair, repair_with_ubt, unlearn_count
from unpoison.detection.exposure import Exposure, expose_by_rank, expose_pairs
from unpoison.detection.neighbours import dao, score_neighbourhoods
from unpoison.detection.ranks import rank_normalise
from unpoison.detection.reference_similarity import low_similarity
from unpoison.detection.similarity_gain import similarity_gain
from unpoison.embedded_pairs import Embedded, caption_cosines, check_spread, check_texts, see_pairs
from unpoison.errors import NotEnoughDataError
from unpoison.evaluation.embeddings import embed_images, embed_texts
from unpoison.evidence import MIN_SAMPLES
from unpoison.models.checkpoints import check_finite
from unpoison.models.logit_scale import scale_warning
from unpoison.results import PoisonEstimate
from unpoison.runs import Run
from unpoison.types import ImageTextModel

UBT_LIMITS = (
    "Whether a backdoor was there, and whether it is gone: the rates before and after are measured only where test "
    "images and a manifest are given.",
    "Poison that does not stand out among these pairs: too few of it, or captions that fit their images.",
    "A second backdoor with another target: one group of pairs is unlearnt. Repair the result again, with the pairs "
    "that `unpoison keep` leaves.",
    TEXT_TOWER_LIMIT,
)
ABL_LIMITS = (
    "Whether a backdoor was there, and whether it is gone: the rates before and after are measured only where test "
    "images and a manifest are given.",
    "Poison among pairs that the model is less sure of. The surest are unlearnt whether they are poison or not.",
)
ALONE = (
    "Pairs are ranked and nothing is decided: without a reference that never saw them, the model that a group of pairs "
    "was found with is the only one that could confirm it, and it confirms clean ones too."
)
NOTHING_EXPOSED = (
    "Whether the pairs are clean: about 1 percent of poison among a few thousand pairs, or less, does not stand out.",
    "Whether the model is clean: only what these pairs taught it was looked for.",
)


@dataclass(frozen=True, kw_only=True)
class UBTOutcome(ClipPurifyOutcome):
    """The repaired copy, and the ranked list of pairs that the repair rests on: of use without the weights too."""

    suspicious: ScanOutcome


def purify_with_ubt(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    *,
    reference: ImageTextModel | None = None,
    config: UBTConfig | None = None,
    run: Run | None = None,
) -> UBTOutcome:
    """Unlearn what the poisoned among its own training ``pairs`` taught a CLIP (arXiv 2409.19526).

    ``reference``: a CLIP that never saw them, best the one that ``clip`` was tuned from; without one, pairs are first
    suspected by DAO alone, and without one, or where it is ``clip`` itself, nothing can be decided: the copy is as the
    model came and is not accepted, unless ``config.always``. ``config`` None: :meth:`UBTConfig.recommended`. The
    caller's model is never changed. Where no group of pairs stands out the copy is as the model came too, and the
    result says so. Refused (``accepted`` is false) when held-out clean pairs fall by more than ``config.bound``, when
    pairs kept aside still match their captions, or when the set is too small to unlearn from: the list is given all
    the same.
    Raises NotEnoughDataError, NoSeparationError (images, or captions, that a model gives one embedding),
    SourceFormatError, ModelError.
    """
    run = run or Run()
    config = config or UBTConfig.recommended(parameters=count_parameters(clip), samples=len(pairs))
    begun = time.monotonic()
    need = max(MIN_SAMPLES, config.fewest_pairs)
    if len(pairs) < need:
        raise NotEnoughDataError(f"pairs in {pairs.name}", have=len(pairs), need=need, hint="Give the whole set.")
    models = {"suspect": clip} | ({} if reference is None else {"reference": reference})
    check_finite(clip.module.state_dict(), name="the model")
    check_texts(pairs, np.arange(len(pairs)), models, run=run)
    known = see_pairs(pairs, clip=clip, reference=reference, captions=True, run=run)
    exposure = _unpack(run.agreed(run.step("exposed", lambda: _pack(_expose(known, config, run)))))
    alone = config.expose == "concept" and not _borne_out(known)
    estimate = nothing_decided(ALONE) if alone else _estimate(exposure, config)
    warnings = (*scale_warning(clip), *_crowded(known, exposure, config))
    suspicious = ranked_outcome(
        known,
        {"exposure": exposure.scores, "probe": exposure.probe},
        exposure.above,
        method="exposure" if config.expose == "concept" else config.expose,
        estimate=estimate,
        warnings=warnings,
        config=asdict(config.exposure),
        models=models,
        seconds=time.monotonic() - begun,
        run=run,
    )
    count = unlearn_count(exposure, config)
    wanted = exposure.exposed or config.always
    if not wanted or count < FEWEST_UNLEARNT:
        repair = leave_alone(clip, pairs, config, run=run)
        few = f" Only {count} pairs may be unlearnt, {FEWEST_UNLEARNT} are needed: give more, or raise unlearn_share."
        said = estimate.reason + (few if wanted else "")
        purification = replace(
            describe_repair("ubt", clip, pairs, config, repair, time.monotonic() - begun, run),
            exposure=_finding(exposure, None), left_alone=True, warnings=(*known.warnings, *warnings),
            accepted=not wanted and not alone,
            reason=f"{said} The model is handed back as it came.",
            not_covered=UBT_LIMITS if wanted else NOTHING_EXPOSED,
        )  # fmt: skip
        return UBTOutcome(clip=repair.model, purification=purification, suspicious=suspicious)
    found = repair_with_ubt(clip, pairs, exposure, config, run=run)
    purification = describe_repair("ubt", clip, pairs, config, found.repair, time.monotonic() - begun, run)
    accepted, said = _judge(found, config, purification.accepted)
    purification = replace(
        purification,
        accepted=accepted,
        reason=f"{estimate.reason} {said} {purification.reason}",
        exposure=_finding(exposure, found),
        warnings=(*known.warnings, *warnings, *purification.warnings),
        inputs=purification.inputs | {name: model.fingerprint for name, model in models.items() if name != "suspect"},
        not_covered=UBT_LIMITS,
    )
    return UBTOutcome(clip=found.repair.model, purification=purification, suspicious=suspicious)


def purify_with_abl_clip(
    clip: ImageTextModel, pairs: ImageTextPairs, *, config: ABLClipConfig | None = None, run: Run | None = None
) -> ClipPurifyOutcome:
    """ABL brought to CLIP (arXiv 2110.11571): unlearn the training ``pairs`` that the model itself finds most similar.

    ``config`` None: :meth:`ABLClipConfig.recommended`. The caller's model is never changed.
    Raises NotEnoughDataError, NoSeparationError (images, or captions, that a model gives one embedding),
    SourceFormatError, ModelError.
    """
    run = run or Run()
    config = config or ABLClipConfig.recommended(parameters=count_parameters(clip), samples=len(pairs))
    begun = time.monotonic()
    check_finite(clip.module.state_dict(), name="the model")
    check_texts(pairs, np.arange(len(pairs)), {"model": clip}, run=run)
    state = run.step("cosines", lambda: {"cosines": torch.from_numpy(_own_cosines(clip, pairs, run))})
    repair = repair_with_abl_clip(clip, pairs, run.agreed(state)["cosines"].numpy(), config, run=run)
    purification = describe_repair("abl-clip", clip, pairs, config, repair, time.monotonic() - begun, run)
    return ClipPurifyOutcome(clip=repair.model, purification=replace(purification, not_covered=ABL_LIMITS))


def _own_cosines(clip: ImageTextModel, pairs: ImageTextPairs, run: Run) -> Float[np.ndarray, " n"]:
    """Of image and caption under the model itself, in [-1, 1]; NaN for pairs that cannot be used."""
    images = embed_images([clip], pairs, run=run)[0]
    rows = np.flatnonzero(images.usable)
    check_spread(images.array[rows], "model")
    cosines = np.full(len(pairs), np.nan)
    cosines[rows] = caption_cosines(clip, pairs, rows, images.array[rows], run=run).own
    return cosines


def _expose(known: Embedded, config: UBTConfig, run: Run) -> Exposure:
    """Step 1, row by row of the whole set."""
    pairs, rows, suspect = known.pairs, known.rows, known.suspect
    if suspect is None:
        raise RuntimeError("the suspect's embeddings were not asked for")
    captions = known.captions
    if known.cosines is None:
        seed = run.seed_of("neighbours")
        low = score_neighbourhoods(suspect, {"dao": dao}, config.neighbours, seed=seed, progress=run.progress)["dao"]
    else:
        low = low_similarity(known.cosines)
    if captions is None:
        captions = embed_texts(known.clip, [texts[0] for texts in pairs.captions(rows)], run=run)
    if config.expose == "gain":
        pixels = load_pixels(pairs, known.clip.image_size, cache=run.cache, progress=run.progress)
        gain = similarity_gain(known.clip, pairs, pixels, rows, -low, config.overfit, run=run)
        found = expose_by_rank(gain, captions, config.exposure, fewest=FEWEST_UNLEARNT)
    elif config.expose == "similarity":
        found = expose_by_rank(rank_normalise(low), captions, config.exposure, fewest=FEWEST_UNLEARNT)
    else:
        misfit = known.misfit if _borne_out(known) else None
        found = expose_pairs(low, suspect, captions, config.exposure, misfit=misfit)
    above = np.zeros(len(pairs), dtype=bool)
    above[rows] = found.above
    return replace(
        found, scores=known.spread(found.scores), probe=known.spread(found.probe), seeds=rows[found.seeds],
        first=rows[found.first], above=above,
    )  # fmt: skip


def _borne_out(known: Embedded) -> bool:
    """Two models: what one finds the other can confirm."""
    return known.cosines is not None and not known.alone


def _pack(exposure: Exposure) -> dict[str, Tensor]:
    misfit = math.nan if exposure.misfit is None else exposure.misfit
    values = [exposure.confirmation, misfit, float(exposure.exposed), *exposure.rates]
    numbers = torch.tensor(values, dtype=torch.float64)
    arrays = {name: getattr(exposure, name) for name in ("scores", "probe", "seeds", "first", "above")}
    return {"numbers": numbers} | {
        name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
    }


def _unpack(state: dict[str, Tensor]) -> Exposure:
    confirmation, misfit, exposed, *rates = state["numbers"].tolist()
    return Exposure(
        scores=state["scores"].numpy(), probe=state["probe"].numpy(), seeds=state["seeds"].numpy(),
        first=state["first"].numpy(), above=state["above"].numpy(), rates=(rates[0], rates[1]),
        confirmation=confirmation, exposed=bool(exposed), misfit=None if math.isnan(misfit) else misfit,
    )  # fmt: skip


def _finding(exposure: Exposure, found: UBTRepair | None) -> PairExposure:
    unlearning = found.unlearning if found is not None else None
    return PairExposure(
        exposed=exposure.exposed,
        confirmation=exposure.confirmation,
        misfit=exposure.misfit,
        rate=100 * exposure.rate,
        seeds=len(exposure.seeds),
        unlearnt=0 if unlearning is None else len(unlearning.texts),
        judges=0 if unlearning is None else len(unlearning.judge_texts),
        level=None if unlearning is None else unlearning.level,
        judged_before=None if found is None else found.judged_before,
        judged_after=None if found is None else found.judged_after,
        words=() if unlearning is None else unlearning.words,
    )


def _estimate(exposure: Exposure, config: UBTConfig) -> PoisonEstimate:
    if config.expose != "concept":
        how = "what an overfitted copy gained on them" if config.expose == "gain" else "how little they match"
        return nothing_decided(f"Pairs are ranked by {how}; that does not say whether any is poisoned.")
    return estimate_poison(exposure, config.exposure)


def _crowded(known: Embedded, exposure: Exposure, config: UBTConfig) -> tuple[str, ...]:
    """What DAO cannot see, where it stands in for a reference."""
    if known.cosines is not None:
        return ()
    total = len(known.rows)
    most, batch = config.neighbours.most_poison(total), min(config.neighbours.batch_size or total, total)
    counted = f"; {100 * exposure.rate:.1f} percent were counted" if exposure.rate > most else ""
    return (
        f"Without a reference pairs are first suspected by DAO in batches of {batch:,}: poison of more than "
        f"{100 * most:.2g} percent is its own neighbours there and ranks low{counted}. Give a reference, or lower "
        "neighbours.batch_size.",
    )


def _judge(found: UBTRepair, config: UBTConfig, accepted: bool) -> tuple[bool, str]:
    """Step 7 beside what every repair is judged by."""
    bound = found.unlearning.level + config.margin
    unlearnt = found.judged_after <= bound
    said = (
        f"Suspicious pairs that were kept aside match their captions with a cosine of {found.judged_after:.2f}, "
        f"{found.judged_before:.2f} before; strangers reach {found.unlearning.level:.2f}, {bound:.2f} is accepted."
    )
    return accepted and unlearnt, said


__all__ = ["UBTOutcome", "purify_with_abl_clip", "purify_with_ubt"]
