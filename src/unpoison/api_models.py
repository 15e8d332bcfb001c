"""Is a checkpoint backdoored? Three verdicts that are kept apart: its files, the data it learnt from, its weights.

from unpoison import open_images, scan_model
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from unpoison import __version__
from unpoison.api import ScanOutcome
from unpoison.api_model_data import check_data_method, judge_data, plan_data
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import LabelledImages
from unpoison.detection.canaries import CanaryConfig, measure_power, summary
from unpoison.detection.class_search import kept_searches
from unpoison.detection.measured import measured_for
from unpoison.detection.model_files import judge_files
from unpoison.detection.model_weights import DECREE, Reference, WeightsConfig, judge_weights, search_reference
from unpoison.detection.probe_images import gather_images
from unpoison.errors import (
    ConfigError,
    ModelError,
    UnpoisonError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    UsageError,
)
from unpoison.model_results import DataVerdict, ModelScan, Power, Reach, WeightsVerdict
from unpoison.models.any_model import AnyModel, Opening, open_any_model, says, try_out
from unpoison.models.clip_transformers import TINY
from unpoison.models.folders import find_model_folder
from unpoison.models.image_classifier import ImageClassifier
from unpoison.models.open_clip_files import PREFIX, locate_open_clip
from unpoison.report.text import duration
from unpoison.runs import Run
from unpoison.types import ImageTextModel

NOT_COVERED = (
    "Patches wider than a fifth of the image, or in several places, in networks that a change spread over the "
    "image fools as easily.",
    "Triggers that depend on the image (input-aware, strong warps) or appear only in texts.",
    "Backdoors whose target is none of the classes that were searched, or that wait for a later fine-tuning.",
    "Models trained to hide their trigger from inversion, such as BadCLIP's.",
    "Backdoors toward several classes at once, where no class stands out from the others.",
)
NOT_COVERED_BY_DECREE = (
    "Triggers that change the whole image or depend on it: only a patch is looked for.",
    "Encoders trained to hide from such a search (BadCLIP), and backdoors that send images to no single place.",
    "Which class or text a trigger leads to: give --classes or labelled --data for that.",
)
NEVER_COVERED = ("Nothing found is no proof that a model is clean.",)
_MADE_UP = (
    "The images were made up. Triggers are found best on images like those that the model is for: give --data SOURCE."
)
_OTHER_NAMES = "The data's class names are not the model's, so their labels were not used."
_ONE_ANSWER = "The model says one and the same of all images: they are not what it is for, or it does not work."
_FEWEST_SAID = 2
_UNFINISHED = (
    "The clean reference {} was not searched to the end in the time given, so nothing is compared with it. Give more "
    "time; what was searched to the end once is kept in the cache."
)
_NO_TIME = (
    "Not looked at: the training data would take about {} and {} of the budget are left. Scan them on their own "
    "(unpoison scan dataset), or give more time."
)
_REFERENCE_SHARE, _MARGIN = 0.5, 1.2
_NO_REFERENCE = (
    "No clean reference model was given: only the model's own classes are compared, and some clean models have one "
    "that is easy to reach. Give --clean-reference MODEL of the same kind."
)


@dataclass(frozen=True, kw_only=True)
class ModelScanConfig:
    """Settings of the weights verdict and of the canaries."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    canaries: CanaryConfig = field(default_factory=CanaryConfig)


@dataclass(frozen=True, kw_only=True)
class ModelScanOutcome:
    """The answer, and the data scan behind its data verdict, None without one."""

    scan: ModelScan
    data: ScanOutcome | None = None


def scan_model(
    model: str | Path,
    *,
    images: LabelledImages | None = None,
    class_names: Sequence[str] | None = None,
    references: Sequence[str | Path] = (),
    trained_on: LabelledImages | ImageTextPairs | None = None,
    data_method: str | None = None,
    clip: ImageTextModel | None = None,
    opening: Opening | None = None,
    power: bool = False,
    budget: float | None = None,
    config: ModelScanConfig | None = None,
    run: Run | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ModelScanOutcome:
    """Scan a classifier or a CLIP: a folder, a hub id, a weights file.

    ``images`` are what triggers are looked for on (their labels serve too where the class names are the model's); None:
    made-up pictures. ``class_names``: a CLIP's zero-shot classes; None: those of ``images``, else it is judged as an
    encoder. ``references``: clean models of the same kind. ``trained_on``: the training data, for the data verdict, by
    ``data_method`` (cgd or a detector; dao for pairs) and ``clip`` (None: the bundled one; for pairs the reference).
    ``budget``: seconds for all of it, as ``clock`` counts them. Half of them at most are for the references, of which
    only those that were searched to the end count; the search of the model stops in time and says what it reached; no
    canary and no scan of data is begun that would not fit. Files that are refused or not recognized are not opened: the
    other verdicts say so.
    Raises ModelError where there is no such model, UsageError, NotEnoughDataError, and for a reference that cannot be
    used UnsafeCheckpointError or UnsupportedModelError.
    """
    run, config, begun = run or Run(), config or ModelScanConfig(), clock()
    opening = opening or Opening()

    def left() -> float | None:
        return None if budget is None else budget - (clock() - begun)

    check_data_method(trained_on, data_method)
    if budget is not None and not budget > 0:
        raise ConfigError(f"expected a budget above 0 seconds, got {budget:g}.", hint="Give 10m, for example.")
    names = list(class_names) if class_names is not None else None
    file = judge_files(files_of(model))
    opened, unopened = None, "Not looked at: " + file.reason
    if file.word == "accepted":
        opened, unopened = try_to_open(model, names, images, opening, run)
    needed = 0.0
    if trained_on is not None and budget is not None:
        plan = plan_data(opened, trained_on, data_method, clip, run=run)
        needed = 0.0 if plan is None else plan.seconds
    if opened is None:
        weights, powers, warnings = WeightsVerdict(word="inconclusive", reason=unopened), None, ()
    else:
        reserve = _MARGIN * needed
        kept = reserve if reserve <= (left() or 0.0) / 2 else 0.0
        weights, powers, warnings = _look(
            opened, images, references, names, opening, power, lambda: _less(left(), kept), config, run, clock
        )
    rest = left()
    if rest is not None and needed > rest:
        data, outcome = (
            DataVerdict(reason=_NO_TIME.format(duration(needed), duration(max(0.0, rest))), asked=True),
            None,
        )
    else:
        data, outcome = judge_data(opened, trained_on, data_method, clip, run=run)
    scan = ModelScan(
        model=str(model),
        kind="" if opened is None else opened.kind,
        file=file,
        data=data,
        weights=weights,
        power=powers,
        warnings=warnings,
        not_covered=_not_covered(weights, powers),
        seconds=clock() - begun,
        seed=run.seed,
        config=asdict(config) | {"budget": budget},
        inputs={"model": "" if opened is None else opened.fingerprint, "unpoison": __version__},
    )
    return ModelScanOutcome(scan=scan, data=outcome)


def try_to_open(
    model: str | Path, names: Sequence[str] | None, images: LabelledImages | None, opening: Opening, run: Run
) -> tuple[AnyModel | None, str]:
    """The model after a first pass, or None and why: files that say what is not so cost the weights verdict only.

    What is wrong with the request itself raises UsageError.
    """
    try:
        opened = open_suspect(model, names, images, opening, run)
        try_out(opened.frozen(run), opening)
    except ModelError as error:
        return None, f"The model could not be opened: {error.message} {error.hint}"
    except UnpoisonError:
        raise
    except Exception as error:  # whatever hostile or odd files make of the libraries that read them
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return None, f"The model could not be opened ({type(error).__name__}: {reason})."
    return opened, ""


def _look(
    opened: AnyModel,
    images: LabelledImages | None,
    references: Sequence[str | Path],
    names: list[str] | None,
    opening: Opening,
    power: bool,
    left: Callable[[], float | None],
    config: ModelScanConfig,
    run: Run,
    clock: Callable[[], float],
) -> tuple[WeightsVerdict, Power | None, tuple[str, ...]]:
    """The weights verdict and the power, with what has to be said about both."""
    frozen = opened.frozen(run)
    probe = gather_images(images, frozen.class_names, frozen.image_size, config.weights.images, run=run)
    warnings: list[str] = []
    clean: list[Reference] = []
    most = _REFERENCE_SHARE * (left() or 0.0)
    for name in references:
        seconds = _less(left(), most)
        reached = _reference(name, opened, images, names, opening, config, run, seconds, clock)
        if reached is None:
            warnings.append(_UNFINISHED.format(name))
        else:
            clean.append((str(name), reached))

    def judge(model: AnyModel, seconds: float | None, step: str | None = None) -> WeightsVerdict:
        return judge_weights(model, probe, clean, config.weights, run=run, seconds=seconds, step=step, clock=clock)

    rest = left()
    share = None if rest is None else max(1.0, rest / 2 if power else rest)
    weights = run.kept("weights", WeightsVerdict, lambda: judge(frozen, share, "search"))
    run.forget(kept_searches("search", len(frozen.class_names), config.weights.search))
    powers = None
    known = measured_for(
        opened.kind, weights.method, config.weights, made_up=probe.made_up, references=bool(weights.references)
    )
    weights = replace(weights, measured=known)
    if power:
        powers = measure_power(
            frozen, probe, judge, config.canaries, run=run, seconds=left(), share=share, needed=weights.seconds,
            clock=clock,
        )  # fmt: skip
    if probe.made_up or probe.labels is None:
        warnings.append(_MADE_UP if probe.made_up else _OTHER_NAMES)
    if frozen.class_names and len(says(frozen, probe.images).unique()) < _FEWEST_SAID:
        warnings.append(_ONE_ANSWER)
    if not references:
        warnings.append(_NO_REFERENCE)
    return weights, powers, tuple(warnings)


def _less(seconds: float | None, kept: float) -> float | None:
    """What remains where some seconds are ``kept`` for later, None where there is no limit."""
    return None if seconds is None else max(0.0, seconds - kept)


def open_suspect(
    model: str | Path, names: Sequence[str] | None, images: LabelledImages | None, opening: Opening, run: Run
) -> AnyModel:
    """The model; a CLIP or a weights file that is given no class names takes those of the data where they can fit."""
    opened = open_any_model(model, class_names=names, opening=opening, run=run)
    if names is not None or images is None:
        return opened
    nameless = Path(model).is_file() and len(opened.class_names) == len(images.class_names)
    if opened.kind == "CLIP" or nameless:
        return open_any_model(model, class_names=images.class_names, opening=opening, run=run)
    return opened


def _reference(
    name: str | Path,
    suspect: AnyModel,
    images: LabelledImages | None,
    names: list[str] | None,
    opening: Opening,
    config: ModelScanConfig,
    run: Run,
    seconds: float | None,
    clock: Callable[[], float],
) -> tuple[Reach, ...] | None:
    """What reaches a clean model's classes, None where time was too short; its files are judged like any others."""
    file = judge_files(files_of(name))
    if file.word != "accepted":
        raise UnsafeCheckpointError(f"reference {name}: {file.reason}", hint="Give another --clean-reference.")
    same_arch = isinstance(suspect.model, ImageClassifier) and Path(name).is_file()
    try:
        found, why = try_to_open(name, names, images, opening if same_arch else Opening(), run)
    except UsageError as error:
        raise UsageError(f"reference {name}: {error.message}", hint=error.hint) from error
    if found is None:
        raise UnsupportedModelError(f"reference {name}: {why}", hint="Give another --clean-reference.")
    if found.kind != suspect.kind or bool(found.class_names) != bool(suspect.class_names):
        raise UnsupportedModelError(
            f"reference {name}: a {found.kind} says nothing of a {suspect.kind}.", hint="Give a model of the same kind."
        )
    frozen = found.frozen(run)
    probe = gather_images(images, frozen.class_names, frozen.image_size, config.weights.images, run=run)
    return search_reference(frozen, probe, config.weights, run=run, seconds=seconds, clock=clock)


def files_of(model: str | Path) -> Path:
    """Where the files of a model are; a hub id is fetched as safetensors and JSON, as a pickle where there are none."""
    if model == "tiny":
        return TINY
    if isinstance(model, str) and model.startswith(PREFIX):
        return locate_open_clip(model)
    path = Path(model)
    return path if path.exists() else find_model_folder(model, pickles=True)


def _not_covered(weights: WeightsVerdict, power: Power | None) -> tuple[str, ...]:
    """What this scan cannot see, by its method; nothing where no weights were looked at."""
    if not weights.method:
        return ()
    said = (*(NOT_COVERED_BY_DECREE if weights.method == DECREE else NOT_COVERED), *NEVER_COVERED)
    if weights.measured is not None and weights.measured.weak:
        families = ", ".join(weights.measured.weak)
        said = (
            f"Triggers of kinds of which fewer than nine in ten were found when it was measured: {families}.",
            *said,
        )
    if power is None:
        return (*said, "What this scan would have missed was not measured (--power).")
    missed = [canary for canary in power.learnt if not canary.found]
    own = [f"Planted to test it and missed: {canary.trigger} at a rate of {canary.rate:g}." for canary in missed]
    return (*said, *own, f"Of the backdoors that were planted to test it, {summary(power.canaries)}.")


__all__ = ["ModelScanConfig", "ModelScanOutcome", "scan_model"]
