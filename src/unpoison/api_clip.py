"""The public verbs for CLIP models: a backdoored one in, a repaired copy out.

from unpoison import load_any_clip, open_pairs, purify_with_par, save_clip
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from unpoison import __version__
from unpoison.clip_loop import no_steps
from unpoison.clip_results import ClipPurification, FoundTrigger, TriggerFinding
from unpoison.clip_training import ClipRepair, PairTrainingConfig, check_precision, check_towers, open_training
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, load_pixels
from unpoison.defenses.baselines.clean_clip import CleanClipConfig, repair_with_clean_clip
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig, repair_with_fine_tuning
from unpoison.defenses.par import PARConfig, repair_with_par
from unpoison.detection.clip_triggers import ConceptSearchConfig, kept_concept_steps, search_concepts
from unpoison.detection.inversion import picture_of
from unpoison.detection.trigger_search import TriggerSearch, load_search, store_search
from unpoison.errors import NotEnoughDataError
from unpoison.evaluation.embeddings import ready
from unpoison.models.checkpoints import check_finite
from unpoison.models.clip_files import notes_on_saving
from unpoison.runs import Run
from unpoison.types import ImageTextModel, Tower

Config = TypeVar("Config", bound=PairTrainingConfig)

_LEAST_GAIN = 5.0
"""Points of held-out accuracy above chance under which held-out pairs judge nothing."""
_MOST_LOST = 0.5
DRIFTED = 0.5
"""Mean cosine with the old embeddings under which the result warns that what was built on them no longer fits."""
CLIP_LIMITS = (
    "Whether a backdoor was there, and whether it is gone: no trigger is known to the method. The rates before and "
    "after are measured only where test images and a manifest are given.",
    "The pairs are taken to be clean; a backdoor in them is learnt.",
)
TEXT_TOWER_LIMIT = (
    "A backdoor that texts set off: the text tower is as it came. What a trigger in a caption does, it still does."
)
PROTECTS: dict[tuple[Tower, ...], str] = {
    (): "nothing more than before; the model is as it came",
    ("image",): "the image tower's weights; the text tower is as it came",
    ("image", "text"): "both towers' weights",
}
"""What a repair that changed these towers makes safe to use."""
LEFT_ALONE = (
    "Whether the model is clean: no trigger was found by a search that knows the concepts of these captions alone. "
    "Repair it all the same where there is reason to doubt it.",
    "A trigger in texts: only changes of images were looked for.",
    "A target that no caption comes near, and models trained to hide their trigger from such a search.",
)


@dataclass(frozen=True, kw_only=True)
class ClipPurifyOutcome:
    """A repaired copy of the CLIP, and what was done to it."""

    clip: ImageTextModel
    purification: ClipPurification


def purify_with_par(
    clip: ImageTextModel, pairs: ImageTextPairs, *, config: PARConfig | None = None, run: Run | None = None
) -> ClipPurifyOutcome:
    """Perturb and recover a CLIP on clean or synthetic pairs (arXiv 2412.00727). The caller's model is never changed.

    ``config`` None: :meth:`PARConfig.recommended`, which goes beyond the paper. :meth:`PARConfig.scaled` is the paper's
    for this model and these pairs, ``PARConfig()`` the paper's as it stands. With ``config.search_concepts`` a trigger
    is looked for first; where none is found the copy is as the model came, and the result says so. It is refused
    (``accepted`` is false) when training was stopped early or the held-out accuracy fell by more than ``config.bound``.
    Raises UsageError for fp16 where gradients are not scaled, NotEnoughDataError, SourceFormatError, ModelError.
    """
    config, run = config or _recommended(PARConfig, clip, pairs), run or Run()
    check_precision(run)
    if not config.search_concepts:
        return _purify("par", repair_with_par, clip, pairs, config, run)
    _check_model(clip, run)
    pixels = load_pixels(pairs, clip.image_size, cache=run.cache, progress=run.progress)
    repair = partial(repair_with_par, pixels=pixels)
    try:
        search, captions = _search(clip, pairs, ConceptSearchConfig(concepts=config.search_concepts), run, pixels)
    except NotEnoughDataError as error:
        outcome = _purify("par", repair, clip, pairs, config, run)
        warning = f"No trigger was looked for before the repair: {error.message}"
        noted = replace(outcome.purification, warnings=(*outcome.purification.warnings, warning))
        return replace(outcome, purification=noted)
    finding = describe_search(search, captions)
    if search.suspects:
        repair = partial(repair, found=search.trigger_of(search.suspects[0]))
    else:
        repair = partial(leave_alone, pixels=pixels)
    outcome = _purify("par", repair, clip, pairs, config, run)
    found = replace(outcome.purification, search=finding, left_alone=not finding.suspected)
    if found.left_alone and found.accepted:
        found = replace(found, reason=f"{finding.reason} The model is handed back as it came.", not_covered=LEFT_ALONE)
    return replace(outcome, purification=found)


def look_for_trigger(
    clip: ImageTextModel, pairs: ImageTextPairs, config: ConceptSearchConfig | None = None, *, run: Run | None = None
) -> TriggerFinding:
    """Is any concept of the captions reached from all images by far too little? (`unpoison.detection.clip_triggers`)

    Raises NotEnoughDataError for few images or captions, SourceFormatError, ModelError.
    """
    run = run or Run()
    _check_model(clip, run)
    return describe_search(*_search(clip, pairs, config, run))


def _check_model(clip: ImageTextModel, run: Run) -> None:
    check_finite(clip.module.state_dict(), name="the model")
    with ready(clip, run):
        check_towers(clip, run)


def _search(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    config: ConceptSearchConfig | None,
    run: Run,
    pixels: Pixels | None = None,
) -> tuple[TriggerSearch, Sequence[str]]:
    """What ``search_concepts`` gives, kept where the run keeps its steps, and the same in all processes."""

    def search() -> dict[str, Tensor]:
        found, captions = search_concepts(clip, pairs, config, run=run, pixels=pixels)
        return store_search(found) | {
            "captions": torch.frombuffer(bytearray(json.dumps(captions).encode()), dtype=torch.uint8)
        }

    stored = run.agreed(run.step("trigger-search", search))
    run.forget(kept_concept_steps(config or ConceptSearchConfig()))
    return load_search(stored, run.device), json.loads(bytes(stored["captions"].tolist()))


def describe_search(search: TriggerSearch, captions: Sequence[str]) -> TriggerFinding:
    """The search as a result, smallest trigger first; ``captions`` say what each class of the search stands for."""
    entries = [
        FoundTrigger(
            caption=captions[trigger.target],
            size=trigger.size,
            success=trigger.success,
            index=index,
            suspected=trigger.target in search.suspects,
            picture=picture_of(trigger),
        )
        for trigger, index in zip(search.triggers, search.index, strict=True)
    ]
    return TriggerFinding(reason=search.reason, found=tuple(sorted(entries, key=lambda entry: entry.size)))


def leave_alone(
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    config: PairTrainingConfig,
    *,
    run: Run,
    pixels: Pixels | None = None,
) -> ClipRepair:
    """A copy as the model came, looked at once on held-out pairs."""
    data = open_training(clip, pairs, config, run=run, pixels=pixels)
    copy = clip.copy()
    with ready(copy, run):
        return no_steps(copy, data)


def purify_with_clean_clip(
    clip: ImageTextModel, pairs: ImageTextPairs, *, config: CleanClipConfig | None = None, run: Run | None = None
) -> ClipPurifyOutcome:
    """CleanCLIP (arXiv 2303.03323), otherwise as :func:`purify_with_par`."""
    config = config or _recommended(CleanClipConfig, clip, pairs)
    return _purify("clean-clip", repair_with_clean_clip, clip, pairs, config, run or Run())


def purify_with_fine_tuning(
    clip: ImageTextModel, pairs: ImageTextPairs, *, config: FineTuningConfig | None = None, run: Run | None = None
) -> ClipPurifyOutcome:
    """Plain fine-tuning on clean pairs, otherwise as :func:`purify_with_par`."""
    config = config or _recommended(FineTuningConfig, clip, pairs)
    return _purify("fine-tuning", repair_with_fine_tuning, clip, pairs, config, run or Run())


def _recommended(kind: type[Config], clip: ImageTextModel, pairs: ImageTextPairs) -> Config:
    return kind.recommended(parameters=count_parameters(clip), samples=len(pairs))


def count_parameters(clip: ImageTextModel) -> int:
    """Numbers that training could change."""
    return sum(value.numel() for value in clip.module.parameters())


def _purify(
    method: str,
    repair_with: Callable[..., ClipRepair],
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    config: PairTrainingConfig,
    run: Run,
) -> ClipPurifyOutcome:
    begun = time.monotonic()
    repair = repair_with(clip, pairs, config, run=run)
    purification = describe_repair(method, clip, pairs, config, repair, time.monotonic() - begun, run)
    return ClipPurifyOutcome(clip=repair.model, purification=purification)


def describe_repair(
    method: str,
    clip: ImageTextModel,
    pairs: ImageTextPairs,
    config: PairTrainingConfig,
    repair: ClipRepair,
    seconds: float,
    run: Run,
) -> ClipPurification:
    """What a training on ``pairs`` did to ``clip``, judged on held-out pairs."""
    allowed = largest_fall(repair, config)
    accepted, reason = judge(repair, allowed)
    kept = repair.kept
    changed = config.trains if repair.planned else ()
    return ClipPurification(
        method=method,
        config=asdict(config),
        accepted=accepted,
        reason=reason,
        protects=PROTECTS[changed],
        bound=round(allowed, 1),
        steps=repair.steps,
        planned_steps=repair.planned,
        batch_size=repair.batch_size,
        seconds=seconds,
        seed=run.seed,
        held_out_before=repair.held_out_before,
        held_out_after=repair.held_out_after,
        chance=kept["chance"],
        image_cosine=kept["image_cosine"],
        text_cosine=kept["text_cosine"],
        trained_pairs=repair.trained_pairs,
        held_out_pairs=repair.held_out_pairs,
        truncated_captions=repair.truncated,
        stopped=repair.stopped,
        warnings=(*repair.warnings, *_warnings(repair), *notes_on_saving(clip)),
        skipped=(*pairs.skipped, *repair.skipped),
        history=repair.history,
        inputs={"model": clip.fingerprint, "pairs": pairs.name, "pairs_content": pairs.fingerprint} | versions(),
        not_covered=CLIP_LIMITS if "text" in changed else (*CLIP_LIMITS, TEXT_TOWER_LIMIT),
    )


def versions() -> dict[str, str]:
    """What the weights may depend on beside the inputs."""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {"unpoison": __version__, "python": platform.python_version()} | libraries


def largest_fall(repair: ClipRepair, config: PairTrainingConfig) -> float:
    """Points of held-out accuracy that may be lost: ``config.bound``, but no more than half of what the given model has
    above chance (ours: a small model may have fewer points to lose). One that has next to nothing is not judged."""
    gain = repair.held_out_before - repair.kept["chance"]
    return config.bound if gain < _LEAST_GAIN else min(config.bound, _MOST_LOST * gain)


def judge(repair: ClipRepair, allowed: float) -> tuple[bool, str]:
    """Whether the repaired model is accepted, and why: training went through, and the held-out pairs still match."""
    if repair.stopped:
        return False, repair.stopped
    fall = repair.held_out_before - repair.held_out_after
    return fall <= allowed, (
        f"Held-out pairs find each other in {repair.held_out_after:.1f} percent of cases, "
        f"{repair.held_out_before:.1f} before; a fall of at most {allowed:.1f} points is accepted."
    )


def _warnings(repair: ClipRepair) -> tuple[str, ...]:
    kept = repair.kept
    warnings = [
        f"The {tower} embeddings moved: mean cosine with the given model's is {kept[f'{tower}_cosine']:.2f}. "
        "Indexes, heads and connectors built on those must be made again."
        for tower in ("image", "text")
        if kept[f"{tower}_cosine"] < DRIFTED
    ]
    if repair.truncated:
        warnings.append(f"The tokenizer cuts off {repair.truncated:,} different captions.")
    gain = repair.held_out_before - kept["chance"]
    if gain < _LEAST_GAIN:
        warnings.append(
            "The given model hardly knows which caption belongs to which of these images: what training cost it cannot "
            "be judged on them."
        )
    return tuple(warnings)
