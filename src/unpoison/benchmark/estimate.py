"""What a grid would take: from cells that ran before, or from a few probed batches. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from unpoison.benchmark.cell import Cell
from unpoison.benchmark.classifier_cells import method_config
from unpoison.benchmark.clip_cells import method_config as clip_config
from unpoison.benchmark.clip_victims import Settings
from unpoison.benchmark.runner import is_left, to_run
from unpoison.benchmark.settings import GIVEN, SHOTS
from unpoison.benchmark.shared import run_of
from unpoison.benchmark.store import Plan, Store
from unpoison.catalog import DEFENSES, find
from unpoison.configs import make_config
from unpoison.data.pairs import open_pairs
from unpoison.data.sources import LabelledImages, open_images
from unpoison.detection.cgd import SeparationConfig
from unpoison.models.classifier import new_classifier
from unpoison.models.clip_files import load_any_clip
from unpoison.planning import Rates, probe
from unpoison.planning_clip import plan_clip_training
from unpoison.planning_zero_shot import plan_zero_shot
from unpoison.runs import Silent

_LIKE_TRAINING = 1.5  # passes of a repair whose config says nothing of steps or epochs, in trainings of the victim


@dataclass(frozen=True, kw_only=True)
class Part:
    """``cells`` cells of one kind, ``seconds`` each."""

    what: str
    cells: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``cells`` in all, ``done`` before; ``parts`` are to run. ``basis`` says where the seconds are from."""

    cells: int
    done: int
    parts: tuple[Part, ...]
    basis: str

    @property
    def seconds(self) -> float:
        return sum(part.cells * part.seconds for part in self.parts)


def estimate(cells: Sequence[Cell], store: Store | None, *, retry: bool = False) -> Estimate:
    """What is left of ``cells`` and about how long it takes. Opens the data and probes each model once."""
    left = list(cells) if store is None else to_run(cells, store, retry=retry)
    known = {} if store is None else measured(store, store.plans())
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in left:
        groups.setdefault((cell.names.data, cell.names.model, cell.names.method), []).append(cell)
    probes: dict[tuple[str, str], Probe] = {}
    parts, probed = [], False
    for (data, model, method), members in groups.items():
        seconds = known.get((data, model, method))
        if seconds is None:
            probed = True
            if (data, model) not in probes:
                probes[data, model] = probe_model(members[0])
            seconds = guess(members[0], probes[data, model])
        what = "victim" if method == GIVEN else method
        parts.append(Part(what=f"{data}, {model}: {what}", cells=len(members), seconds=seconds))
    basis = "from a few probed batches" if probed else "from cells that ran before"
    return Estimate(cells=len(cells), done=len(cells) - len(left), parts=tuple(parts), basis=basis)


def time_left(store: Store, plans: Sequence[Plan]) -> float | None:
    """Seconds for what has not run, by the median of like cells; None before any of its kind ran."""
    known = measured(store, plans)
    left = [cell for plan in plans for cell in plan.cells if is_left(cell.key, cell.names, store)]
    times = [known.get((cell.names.data, cell.names.model, cell.names.method)) for cell in left]
    found = [seconds for seconds in times if seconds is not None]
    if not left:
        return 0.0
    return sum(found) * len(left) / len(found) if found else None


def measured(store: Store, plans: Sequence[Plan]) -> dict[tuple[str, str, str], float]:
    """Median wall seconds of the done cells of each data set, model and method."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for plan in plans:
        for cell in plan.cells:
            result = store.found(cell.key, cell.names)
            if result is not None and result.status == "done" and not result.cost.resumed:
                names = cell.names
                found.setdefault((names.data, names.model, names.method), []).append(result.cost.wall)
    return {key: median(values) for key, values in found.items()}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one model and data set were measured at. Classifiers have ``rates``, CLIPs a loaded ``clip``."""

    train: LabelledImages
    tested: int
    rates: Rates | None = None
    clip: Any = None


def probe_model(cell: Cell) -> Probe:
    """Open the data, load the model and time a few batches."""
    test = open_images(cell.data.test)
    train = test if cell.data.train is None else open_images(cell.data.train)
    clip = load_any_clip(cell.model.model if cell.model.kind == "clip" else cell.model.clip)
    if cell.model.kind == "clip":
        return Probe(train=train, tested=len(test), clip=clip)
    network = new_classifier(cell.model.arch, train.class_names, image_size=cell.model.image_size)
    rates = probe(train, clip, network, run=run_of(cell, None, Silent()))
    return Probe(train=train, tested=len(test), rates=rates)


def guess(cell: Cell, known: Probe) -> float:
    """Seconds of one cell. Each repair counts the scores as its own, so that a grid that shares them takes less."""
    if known.rates is None:
        return _guess_clip(cell, known)
    samples, rates, model = len(known.train), known.rates, cell.model
    measure = 2 * known.tested * (1 / rates.forward + 1 / rates.decode)
    training = model.epochs * samples / rates.train
    if cell.method is None:
        return training + samples / rates.decode + measure
    config = method_config(cell.method, samples, model.scores)
    separation = getattr(config, "separation", make_config(SeparationConfig, model.scores, where="scores"))
    scoring = separation.scorers * separation.scorer_epochs * samples / rates.train + samples / rates.clip
    steps, epochs = getattr(config, "steps", None), getattr(config, "epochs", None)
    passed = _LIKE_TRAINING * model.epochs * samples
    if steps is not None:
        passed = steps * getattr(config, "batch_size", 128)
    elif epochs is not None:
        passed = epochs * samples
    return scoring + passed / rates.train + measure


def _guess_clip(cell: Cell, known: Probe) -> float:
    pairs = open_pairs(cell.data.captioned or "shapes:200:0", limit=200)
    settings = make_config(Settings, cell.model.victim, where="victim")
    config, run = cell.method, run_of(cell, None, Silent())
    if config is not None and SHOTS in find(config.method, DEFENSES).needs:
        shots, settings = open_images(cell.data.shots or ""), clip_config(config, known.clip, 0)
        return plan_zero_shot(known.clip, shots, settings, run=run, tested=known.tested).seconds
    made = clip_config(config, known.clip, len(known.train)) if config is not None else None
    if made is None:
        from unpoison.clip_training import PairTrainingConfig

        made = PairTrainingConfig(steps=settings.steps, batch_size=min(settings.batch, 64))
        scale = settings.batch / made.batch_size
    else:
        scale = 1.0
    plan = plan_clip_training(known.clip, pairs, made, run=run, tested=known.tested)
    return scale * plan.seconds
