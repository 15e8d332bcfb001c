"""The weights verdict: do a model's weights behave as if backdoored, trigger and target unknown?

Steps
    1. A model with class names: the least change that reaches each class, in three forms
       (:mod:`unpoison.detection.class_search`). An encoder without: DECREE (:mod:`unpoison.detection.decree`).
    2. The same on clean reference models of the same kind, where there are any; kept in the run's cache.
    3. How far is the smallest trigger out of line, among the model's own classes and beside the references'
       (:mod:`unpoison.detection.anomaly`)? The form with the clearer outlier decides. After half a search, or on
       made-up images, a model is "suspicious" at most, and without a finding "inconclusive".
    4. A CLIP with class names, after a whole search on real images: waves, which are never small
       (:mod:`unpoison.detection.waves`). One that is found counts by how far it is over its thresholds, at which the
       model is called backdoored; the higher score decides.
    5. The verdict in words; the trigger as a picture, and its success on images that no search has seen.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unpoison.detection.anomaly import FEWEST_CLASSES, AnomalyConfig, Judgement, capped, judge_reach
from unpoison.detection.class_search import (
    ClassSearch,
    ClassSearchConfig,
    SearchedClass,
    kept_searches,
    search_classes,
)
from unpoison.detection.decree import DECREEConfig, DECREEFinding, decree
from unpoison.detection.inversion import InvertedTrigger, Logits, picture_of
from unpoison.detection.probe_images import ProbeImages
from unpoison.detection.trigger_search import say_size
from unpoison.detection.waves import FoundWave, WaveConfig, find_waves
from unpoison.errors import ConfigError
from unpoison.evaluation.intervals import wilson
from unpoison.model_results import ClassTrigger, ClassWave, Reach, WeightsVerdict, WeightsWord
from unpoison.models.any_model import AnyModel, says
from unpoison.models.clip_transformers import half_where_fast
from unpoison.results import Interval, write_atomically
from unpoison.runs import Run
from unpoison.types import Images

INVERSION, DECREE, MASK, WAVE = "class-wise inversion", "DECREE", "mask", "wave"
_SEARCHED_BY = ("class_search", "inversion", "squares", "decree", "probe_images", "waves")
_GIVE_DATA = " The images were made up; the scan's power was only measured with real ones: give --data."
Reference = tuple[str, tuple[Reach, ...]]
"""A clean model's name, and what reaches its classes; of an encoder its DECREE mask."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """How the weights are looked at. All numbers are ours."""

    images: int = 480
    search: ClassSearchConfig = field(default_factory=ClassSearchConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    decree: DECREEConfig = field(default_factory=DECREEConfig)
    waves: WaveConfig = field(default_factory=WaveConfig)
    reference_share: float = 0.5
    """An encoder is called backdoored where its mask is at most this share of the smallest of clean references."""

    def __post_init__(self) -> None:
        if self.images < 64 or not 0 < self.reference_share <= 1:
            raise ConfigError("expected images >= 64 and reference_share in (0, 1].", hint="Try 480 and 0.5.")


def search_inputs(config: WeightsConfig) -> dict[str, Any]:
    """What decides which triggers a search finds, beside model, images and seed: its settings and its source files.

    Not the thresholds: what was found is judged anew by others (:func:`unpoison.detection.anomaly.judge_reach`).
    """
    code = hashlib.blake2b(digest_size=8)
    for name in _SEARCHED_BY:
        code.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    decree = {key: value for key, value in asdict(config.decree).items() if key != "backdoored"}
    return {
        "images": config.images, "search": asdict(config.search), "decree": decree, "waves": asdict(config.waves),
        "code": code.hexdigest(),
    }  # fmt: skip


def fast_logits(model: AnyModel, run: Run) -> Logits:
    """The logits of a frozen model for a search, in bfloat16 where the machine computes in it: half the time a step."""

    def logits(images: Images) -> Float[Tensor, "b k"]:
        with half_where_fast(run.device):
            return model.logits(images).float()

    return logits


def judge_weights(
    model: AnyModel,
    probe: ProbeImages,
    references: Sequence[Reference] = (),
    config: WeightsConfig | None = None,
    *,
    run: Run,
    seconds: float | None = None,
    step: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> WeightsVerdict:
    """Steps 1 to 5 for a :meth:`AnyModel.frozen` model. ``references`` are names with :func:`search_reference`.

    ``seconds``: the search stops about then and reports what it reached. ``step``: what the names of the run's steps
    begin with that keep what was searched. Raises NotEnoughDataError.
    """
    config, begun = config or WeightsConfig(), clock()
    common = {
        "images": len(probe.images),
        "image_source": probe.source,
        "made_up": probe.made_up,
        "references": tuple(name for name, _ in references),
        "reference_classes": tuple(entry for _, own in references for entry in own),
    }
    if not model.class_names:
        found = decree(model.encode, probe.images, config.decree, run=run, seconds=seconds, clock=clock)
        return _judge_encoder(found, config, common | {"seconds": clock() - begun})
    search = search_classes(
        fast_logits(model, run), probe.images, len(model.class_names), config.search, run=run, seconds=seconds,
        clock=clock, step=step,
    )  # fmt: skip
    common |= {"seconds": clock() - begun, "suspicious_from": config.anomaly.suspicious,
               "backdoored_from": config.anomaly.backdoored}  # fmt: skip
    return _judge_classes(model, probe, search, config, common)


def search_reference(
    model: AnyModel,
    probe: ProbeImages,
    config: WeightsConfig,
    *,
    run: Run,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Reach, ...] | None:
    """Step 2 for one clean :meth:`AnyModel.frozen` model, from the run's cache where it was done before.

    None where ``seconds`` are not enough for all of the search: triggers of half a search are larger, and a suspect's
    would look small beside them.
    """
    inputs = [search_inputs(config), model.fingerprint, _hash_of(probe.images), run.seed]
    key = hashlib.blake2b(msgspec.json.encode(inputs), digest_size=16).hexdigest()
    path = None if run.cache is None else run.cache / "model-scan" / f"{key}.json"
    if path is not None and path.exists():
        try:
            return msgspec.json.decode(path.read_bytes(), type=tuple[Reach, ...])
        except msgspec.DecodeError:
            run.progress.log(f"{path.name} is damaged and is computed again")
    if not model.class_names:
        found = decree(model.encode, probe.images, config.decree, run=run, seconds=seconds, clock=clock)
        if found.steps < config.decree.steps:
            return None
        reached = (Reach(form=MASK, size=found.trigger.size, success=found.trigger.success),)
    else:
        count, step = len(model.class_names), f"reference-{key}"
        search = search_classes(
            fast_logits(model, run), probe.images, count, config.search, run=run, seconds=seconds, clock=clock,
            step=step,
        )  # fmt: skip
        if search.cut:
            return None
        reached = tuple(_reach(entry) for entry in _every(search))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.encode(reached))
        run.forget(kept_searches(f"reference-{key}", len(model.class_names), config.search))
    return reached


def _judge_classes(
    model: AnyModel, probe: ProbeImages, search: ClassSearch, config: WeightsConfig, common: dict
) -> WeightsVerdict:
    names, every, covered = model.class_names, _every(search), 100 * search.covered
    judged = judge_reach(
        [_reach(entry) for entry in every], common["reference_classes"], config.anomaly, covered=covered,
        made_up=probe.made_up,
    )  # fmt: skip
    rows = [_row(entry, names, own, beside)
            for entry, own, beside in zip(every, judged.own, judged.beside, strict=True)]  # fmt: skip
    common |= {"method": INVERSION, "covered": covered,
               "classes": tuple(sorted(rows, key=lambda row: -row.index))}  # fmt: skip
    if judged.candidate is None:
        few = len(names) < FEWEST_CLASSES and search.complete
        why = (
            f"{len(names)} classes are too few to compare with each other; give --clean-reference."
            if few
            else f"{covered:.0f} percent of the search was done, which reached fewer than {FEWEST_CLASSES} classes."
        )
        return WeightsVerdict(word="inconclusive", reason=f"Nothing can be said: {why}", **common)
    trigger = every[judged.candidate].trigger
    reason = _reason(trigger, judged, every, names, search, probe, config)
    waves = _look_for_waves(model, probe, search, config)
    common["waves"] = tuple(_wave(wave, names) for wave in waves)
    score = max((wave_score(wave, config.anomaly, config.waves) for wave in common["waves"]), default=0.0)
    if score > judged.score:
        trigger, wave = waves[0].trigger, common["waves"][0]
        said = {"word": "backdoored", "reason": _wave_reason(wave, trigger, reason), "score": score, "form": WAVE}
    else:
        said = {
            "word": judged.word, "reason": reason, "score": judged.score, "form": trigger.form,
            "index": judged.interval, "reference_index": judged.beside[judged.candidate],
        }  # fmt: skip
    asr, floor = _success(model, probe, search.unseen, trigger)
    return WeightsVerdict(
        target=trigger.target, target_name=names[trigger.target], size=trigger.size, asr=asr, asr_floor=floor,
        picture=picture_of(trigger), **said, **common,
    )  # fmt: skip


def wave_score(wave: ClassWave, anomaly: AnomalyConfig, waves: WaveConfig) -> float:
    """A found wave on the scale of :func:`unpoison.detection.anomaly.judge_reach`: at its thresholds "backdoored"."""
    return anomaly.backdoored * min(wave.lead / waves.lead, wave.fit / waves.fit)


def _look_for_waves(
    model: AnyModel, probe: ProbeImages, search: ClassSearch, config: WeightsConfig
) -> tuple[FoundWave, ...]:
    """Step 4, the highest score first. A classifier's logits are no cosines: their fit would mean nothing."""
    if model.kind != "CLIP" or probe.made_up or not search.complete:
        return ()
    used = torch.ones(len(probe.images), dtype=torch.bool)
    used[search.unseen.cpu()] = False
    rows = torch.nonzero(used)[:, 0].to(probe.images.device)
    rows = rows[torch.linspace(0, len(rows) - 1, config.waves.images).long()]  # those of a folder stand class by class
    chosen, judging = probe.images[rows.unique()], probe.images[search.unseen]
    found = find_waves(model.logits, chosen, judging, range(len(model.class_names)), config.waves)
    return tuple(sorted(found, key=lambda wave: -min(wave.lead / config.waves.lead, wave.fit / config.waves.fit)))


def _judge_encoder(found: DECREEFinding, config: WeightsConfig, common: dict) -> WeightsVerdict:
    trigger, size = found.trigger, found.trigger.size
    covered = 100 * found.steps / config.decree.steps
    clean = [entry.size for entry in common["reference_classes"]]
    least = min(clean, default=None)
    said = f"A mask of {100 * size:.1f} percent of an image makes embeddings agree (mean cosine {found.agreement:.2f})"
    if least is not None:
        said += f"; the clean references need {100 * least:.1f} percent or more"
    if not found.reached:
        said = f"No mask made the embeddings agree in {found.steps} steps"
    agrees = found.agreement > found.plain
    word = judge_mask(size, clean, config, reached=found.reached, agrees=agrees)
    against = None if least is None else float(np.log(least / size) / config.anomaly.floor)
    return WeightsVerdict(
        word=capped(word, covered=covered, made_up=common["made_up"]),
        reason=f"{said}.{_GIVE_DATA if common['made_up'] else ''}",
        method=DECREE,
        score=float(-np.log(max(size, 1e-6))),
        reference_index=against,
        form=trigger.form,
        size=size,
        picture=picture_of(trigger),
        covered=covered,
        **common,
    )


def judge_mask(
    size: float, clean: Sequence[float], config: WeightsConfig, *, reached: bool, agrees: bool
) -> WeightsWord:
    """The word for a DECREE mask of this ``size`` beside the ``clean`` references' (shares of the image in [0, 1]).

    ``reached``: it made embeddings agree in the search; ``agrees``: more than without it on unseen images, too.
    """
    if not reached:
        return "inconclusive"
    small = size <= config.decree.backdoored
    beside = size <= config.reference_share * min(clean, default=1.0)
    if small and (beside or not clean):
        return "backdoored"
    return "suspicious" if (small or (beside and clean)) and agrees else "no evidence"


def _every(search: ClassSearch) -> list[SearchedClass]:
    return [entry for found in search.found.values() for entry in found]


def _reach(entry: SearchedClass) -> Reach:
    return Reach(form=entry.trigger.form, size=entry.trigger.size, success=entry.trigger.success)


def _row(entry: SearchedClass, names: Sequence[str], own: float | None, beside: float | None) -> ClassTrigger:
    trigger = entry.trigger
    return ClassTrigger(
        name=names[trigger.target], target=trigger.target, form=trigger.form, size=trigger.size,
        success=trigger.success, index=own or 0.0, reference_index=beside, steps=entry.steps, finished=entry.finished,
    )  # fmt: skip


def _wave(found: FoundWave, names: Sequence[str]) -> ClassWave:
    trigger = found.trigger
    return ClassWave(
        name=names[trigger.target], target=trigger.target, lead=found.lead, fit=found.fit, size=trigger.size,
        success=trigger.success,
    )  # fmt: skip


def _wave_reason(wave: ClassWave, trigger: InvertedTrigger, otherwise: str) -> str:
    return (
        f"A wave over the whole image, {say_size(trigger)}, sends {wave.success:.0f} percent of unseen images to "
        f"{wave.name!r}, and the model is {wave.lead:.1f} times as sure of it as of plain images; these then fit the "
        f"class {wave.fit:.2f} times as well as those plain ones that fit it best. Of small changes: {otherwise}"
    )


def _success(
    model: AnyModel, probe: ProbeImages, unseen: Tensor, trigger: InvertedTrigger
) -> tuple[Interval | None, Interval | None]:
    """Of unseen images of other classes, those that are taken for the target: with the trigger and without.

    Of other classes by their labels, or where there are none by what the model says of them: then there is no floor to
    measure, since none of them is taken for the target.
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
    return asr, None if probe.labels is None else floor


def _reason(
    trigger: InvertedTrigger,
    judged: Judgement,
    every: Sequence[SearchedClass],
    names: Sequence[str],
    search: ClassSearch,
    probe: ProbeImages,
    config: WeightsConfig,
) -> str:
    place, interval, cuts = judged.candidate or 0, judged.interval, config.anomaly
    own, beside = judged.own[place], judged.beside[place]
    against = [f"{own:.1f} deviations under the median of the classes" if own is not None else "",
               f"{beside:.1f} under the clean references'" if beside is not None else ""]  # fmt: skip
    said = (
        f"{say_size(trigger).capitalize()} sends {trigger.success:.0f} percent of unseen images to "
        f"{names[trigger.target]!r}: {', '.join(filter(None, against))}."
    )
    found = judged.word in ("backdoored", "suspicious")
    if not found:
        said = f"No class is reached by a change that is out of line (from {cuts.suspicious:g} on). The first: {said}"
        best = max(entry.trigger.success for entry in every)
        if best < cuts.success:
            said = f"No trigger sends more than {best:.0f} percent of unseen images to any class. {said}"
    elif judged.score >= cuts.backdoored and interval is not None and interval.low < cuts.suspicious:
        said += f" Not more than suspicious, because the index may be as low as {interval.low:.1f}."
    if not search.complete:
        looked = f"{search.seen} of {search.planned} classes were looked at"
        said += f" {100 * search.covered:.0f} percent of the search was done; {looked}."
        said += " Half a search decides nothing more than that." if found else ""
    return said + (_GIVE_DATA if probe.made_up else "")


def _hash_of(images: Tensor) -> str:
    return hashlib.blake2b(images.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
