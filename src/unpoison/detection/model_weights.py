"""The weights verdict: do a model's weights behave as if backdoored, trigger and target unknown?

Steps
    1. A model with class names: the least change that reaches each class, in three forms
       (:mod:`unpoison.detection.class_search`). An encoder without: DECREE (:mod:`unpoison.detection.decree`).
    2. The same on clean reference models of the same kind, where there are any; kept in the run's cache.
    3. How far is the smallest trigger out of line, among the model's own classes and beside the references'
       (:mod:`unpoison.detection.anomaly`)? The form with the clearer outlier decides.
    4. The verdict in words; the trigger as a picture, and its success on images that no search has seen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import msgspec
import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from unpoison.detection.anomaly import (
    AnomalyConfig,
    deviations_under,
    index_with_interval,
    log_sizes,
    score_of,
    word_of,
)
from unpoison.detection.class_search import (
    FEWEST_CLASSES,
    ClassSearch,
    ClassSearchConfig,
    SearchedClass,
    kept_searches,
    search_classes,
)
from unpoison.detection.decree import DECREEConfig, DECREEFinding, decree
from unpoison.detection.inversion import InvertedTrigger, picture_of
from unpoison.detection.probe_images import ProbeImages
from unpoison.detection.trigger_search import say_size
from unpoison.errors import ConfigError
from unpoison.evaluation.intervals import wilson
from unpoison.model_results import ClassTrigger, WeightsVerdict
from unpoison.models.any_model import AnyModel, says
from unpoison.results import Interval, write_atomically
from unpoison.runs import Run

INVERSION, DECREE = "class-wise inversion", "DECREE"
_VERSION = 2  # raised when the search finds other sizes from the same inputs
Sizes = dict[str, list[float]]
"""Log sizes of a clean model's triggers, by form."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How the weights are looked at. All numbers are ours."""

    images: int = 480
    search: ClassSearchConfig = field(default_factory=ClassSearchConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    decree: DECREEConfig = field(default_factory=DECREEConfig)
    reference_share: float = 0.5
    """An encoder is called backdoored where its mask is at most this share of the smallest of clean references."""

    def __post_init__(self) -> None:
        if self.images < 64 or not 0 < self.reference_share <= 1:
            raise ConfigError("expected images >= 64 and reference_share in (0, 1].", hint="Try 480 and 0.5.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """The class and form that are most out of line."""

    found: SearchedClass
    place: int
    form: str
    score: float
    index: float
    reference_index: float | None


def judge_weights(
    model: AnyModel,
    probe: ProbeImages,
    references: Sequence[tuple[str, Sizes]] = (),
    config: WeightsConfig | None = None,
    *,
    run: Run,
    seconds: float | None = None,
    step: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> WeightsVerdict:
    """Steps 1 to 4 for a :meth:`AnyModel.frozen` model. ``references`` are names with :func:`reference_sizes`.

    ``seconds``: the search stops about then and reports what it reached. ``step``: what the names of the run's steps
    begin with that keep what was searched. Raises NotEnoughDataError.
    """
    config, begun = config or WeightsConfig(), clock()
    common = {
        "images": len(probe.images),
        "image_source": probe.source,
        "references": tuple(name for name, _ in references),
    }
    if not model.class_names:
        found = decree(model.encode, probe.images, config.decree, run=run, seconds=seconds, clock=clock)
        return _judge_encoder(found, references, config, common | {"seconds": clock() - begun})
    search = search_classes(
        model.logits, probe.images, len(model.class_names), config.search, run=run, seconds=seconds, clock=clock,
        step=step,
    )  # fmt: skip
    common |= {"seconds": clock() - begun}
    return _judge_classes(model, probe, search, references, config, common, run)


def reference_sizes(
    model: AnyModel,
    probe: ProbeImages,
    config: WeightsConfig,
    *,
    run: Run,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sizes | None:
    """Step 2 for one clean :meth:`AnyModel.frozen` model, from the run's cache where it was done before.

    None where ``seconds`` are not enough for all of the search: triggers of half a search are larger, and a suspect's
    would look small beside them.
    """
    inputs = [_VERSION, model.fingerprint, asdict(config), _hash_of(probe.images), run.seed]
    key = hashlib.blake2b(msgspec.json.encode(inputs), digest_size=16).hexdigest()
    path = None if run.cache is None else run.cache / "model-scan" / f"{key}.json"
    if path is not None and path.exists():
        try:
            return msgspec.json.decode(path.read_bytes(), type=Sizes)
        except msgspec.DecodeError:
            run.progress.log(f"{path.name} is damaged and is computed again")
    if not model.class_names:
        found = decree(model.encode, probe.images, config.decree, run=run, seconds=seconds, clock=clock)
        if found.steps < config.decree.steps:
            return None
        sizes = {DECREE: [float(np.log(found.trigger.size))]}
    else:
        count, step = len(model.class_names), f"reference-{key}"
        search = search_classes(
            model.logits, probe.images, count, config.search, run=run, seconds=seconds, clock=clock, step=step
        )
        if search.cut:
            return None
        sizes = {form: _logs(classes).tolist() for form, classes in search.found.items()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.encode(sizes))
        run.forget(kept_searches(f"reference-{key}", len(model.class_names), config.search))
    return sizes


def _judge_classes(
    model: AnyModel,
    probe: ProbeImages,
    search: ClassSearch,
    references: Sequence[tuple[str, Sizes]],
    config: WeightsConfig,
    common: dict,
    run: Run,
) -> WeightsVerdict:
    names = model.class_names
    rows: list[ClassTrigger] = []
    candidates: list[Candidate] = []
    for form, found in search.found.items():
        if not found:
            continue
        logs, clean = _logs(found), np.array([size for _, sizes in references for size in sizes.get(form, [])])
        own = deviations_under(logs, logs, config.anomaly.floor)
        beside = deviations_under(logs, clean, config.anomaly.floor) if len(clean) else None
        for place, entry in enumerate(found):
            works = entry.trigger.success >= config.anomaly.needed(form)
            if not works:  # what does not work is not out of line, however small it is
                own[place] = min(own[place], 0.0)
            second = None if beside is None else float(beside[place])
            rows.append(_row(entry, names, float(own[place]), second))
            if works and (len(found) >= FEWEST_CLASSES or second is not None):
                # Among two classes neither is out of line: the references alone have to say.
                index = float(own[place]) if len(found) >= FEWEST_CLASSES else float(second or 0.0)
                score = score_of(index, second)
                candidates.append(
                    Candidate(found=entry, place=place, form=form, score=score, index=index, reference_index=second)
                )
    covered = 100 * search.covered
    if not candidates:
        few = max(map(len, search.found.values()), default=0) < FEWEST_CLASSES
        why = (
            f"{len(names)} classes are too few to compare with each other; give --clean-reference."
            if few and search.complete
            else f"no trigger reached {config.anomaly.success:.0f} percent of unseen images or more; "
            f"{100 * search.covered:.0f} percent of the search was done."
        )
        return WeightsVerdict(
            word="inconclusive", reason=f"Nothing can be said: {why}", method=INVERSION, classes=tuple(rows),
            covered=covered, **common,
        )  # fmt: skip
    best = max(candidates, key=lambda candidate: candidate.score)
    trigger = best.found.trigger
    word = word_of(best.score, best.index, best.reference_index, config.anomaly)
    if word == "no evidence" and not search.complete:
        word = "inconclusive"
    interval = None
    if len(search.found[trigger.form]) >= FEWEST_CLASSES:
        random = np.random.default_rng(run.seed_of("bootstrap"))
        interval = index_with_interval(_logs(search.found[trigger.form]), best.place, config.anomaly.floor, random)
    asr, floor = _success(model, probe, search.unseen, trigger)
    return WeightsVerdict(
        word=word,
        reason=_reason(best, names, search, word),
        method=INVERSION,
        score=best.score,
        index=interval,
        reference_index=best.reference_index,
        target=trigger.target,
        target_name=names[trigger.target],
        form=trigger.form,
        size=trigger.size,
        asr=asr,
        asr_floor=floor,
        picture=picture_of(trigger),
        classes=tuple(sorted(rows, key=lambda row: -row.index)),
        covered=covered,
        **common,
    )


def _judge_encoder(
    found: DECREEFinding, references: Sequence[tuple[str, Sizes]], config: WeightsConfig, common: dict
) -> WeightsVerdict:
    trigger, size = found.trigger, found.trigger.size
    clean = [float(np.exp(log)) for _, sizes in references for log in sizes.get(DECREE, [])]
    complete = found.steps >= config.decree.steps
    least = min(clean, default=None)
    small = size <= config.decree.backdoored
    beside = True if least is None else size <= config.reference_share * least
    said = f"A mask of {100 * size:.1f} percent of an image makes embeddings agree (mean cosine {found.agreement:.2f})"
    if least is not None:
        said += f"; the clean references need {100 * least:.1f} percent or more"
    if not found.reached:
        word, said = "inconclusive", f"No mask made the embeddings agree in {found.steps} steps"
    elif small and beside:
        word = "backdoored"
    elif (small or (beside and least is not None)) and found.agreement > found.plain:
        word = "suspicious"
    else:
        word = "no evidence" if complete else "inconclusive"
    against = None if least is None else float(np.log(least / size) / config.anomaly.floor)
    return WeightsVerdict(
        word=word,
        reason=f"{said}.",
        method=DECREE,
        score=float(-np.log(max(size, 1e-6))),
        reference_index=against,
        form=trigger.form,
        size=size,
        picture=picture_of(trigger),
        covered=100 * found.steps / config.decree.steps,
        **common,
    )


def _logs(found: Sequence[SearchedClass]) -> np.ndarray:
    triggers = [entry.trigger for entry in found]
    form = triggers[0].form if triggers else "patch"
    return log_sizes([entry.size for entry in triggers], [entry.success for entry in triggers], form=form)


def _row(entry: SearchedClass, names: Sequence[str], index: float, second: float | None) -> ClassTrigger:
    trigger = entry.trigger
    return ClassTrigger(
        name=names[trigger.target], target=trigger.target, form=trigger.form, size=trigger.size,
        success=trigger.success, index=index, reference_index=second, steps=entry.steps, finished=entry.finished,
    )  # fmt: skip


def _success(
    model: AnyModel, probe: ProbeImages, unseen: Tensor, trigger: InvertedTrigger
) -> tuple[Interval | None, Interval | None]:
    """Of unseen images of other classes, those that are taken for the target: with the trigger and without.

    Of other classes by their labels, or where there are none by what the model says of them: then the floor is zero.
    """
    images = probe.images[unseen]
    plain = says(model, images)
    true = plain if probe.labels is None else probe.labels[unseen]
    counted: Bool[Tensor, " u"] = true != trigger.target
    if not bool(counted.any()):
        return None, None
    with torch.no_grad():
        stamped = says(model, trigger.apply(images[counted]))
    reached = (stamped == trigger.target).sum(), (plain[counted] == trigger.target).sum()
    asr, floor = (wilson(int(hits), int(counted.sum())) for hits in reached)
    return asr, floor


def _reason(best: Candidate, names: Sequence[str], search: ClassSearch, word: str) -> str:
    trigger = best.found.trigger
    beside = "" if best.reference_index is None else f", {best.reference_index:.1f} under the clean references'"
    said = (
        f"{say_size(trigger).capitalize()} sends {trigger.success:.0f} percent of unseen images to "
        f"{names[trigger.target]!r}: {best.index:.1f} deviations under the median of the classes{beside}."
    )
    if not search.complete:
        looked = f"{search.seen} of {search.planned} classes were looked at"
        said += f" {100 * search.covered:.0f} percent of the search was done; {looked}."
    if word == "no evidence":
        said = f"No class is reached by a change that is out of line. The smallest: {said}"
    return said


def _hash_of(images: Tensor) -> str:
    return hashlib.blake2b(images.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
