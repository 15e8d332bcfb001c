"""What a grid would take: from cells that ran before, or from a few probed batches. Writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from unpoison.attacks.prompts import TEMPLATES
from unpoison.benchmark.cell import Cell
from unpoison.benchmark.classifier_cells import method_config
from unpoison.benchmark.clip_cells import OWN_PAIRS, clean_pairs
from unpoison.benchmark.clip_cells import method_config as clip_config
from unpoison.benchmark.clip_victims import Settings
from unpoison.benchmark.runner import is_left, to_run
from unpoison.benchmark.settings import GIVEN, SHOTS
from unpoison.benchmark.shared import run_of
from unpoison.benchmark.store import Plan, Store
from unpoison.catalog import DEFENSES, find
from unpoison.clip_training import PairTrainingConfig
from unpoison.configs import make_config
from unpoison.data.pairs import ImageTextPairs, open_pairs, pairs_of_labels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
from unpoison.defenses.ubt import UBTConfig
from unpoison.detection.cgd import SeparationConfig
from unpoison.models.classifier import new_classifier
from unpoison.models.clip_files import load_any_clip
from unpoison.planning import Rates, probe
from unpoison.planning_clip import plan_clip_training
from unpoison.planning_zero_shot import plan_zero_shot
from unpoison.runs import Silent
from unpoison.types import ImageTextModel

_LIKE_TRAINING = 1.5  # passes of a repair whose config says nothing of steps or epochs, in trainings of the victim


@dataclass(frozen=True, kw_only=True)
class Part:
    """``cells`` cells of one kind, ``seconds`` each: ``measured`` on cells that ran before, or guessed."""

    what: str
    cells: int
    seconds: float
    measured: bool


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """``cells`` in all, ``done`` before; ``failed``: without figures, and left as they are, by their status. ``parts``
    are to run. ``basis`` says where the seconds are from."""

    cells: int
    done: int
    failed: dict[str, int]
    parts: tuple[Part, ...]
    basis: str

    @property
    def seconds(self) -> float:
        return sum(part.cells * part.seconds for part in self.parts)


def estimate(cells: Sequence[Cell], store: Store | None, *, retry: bool = False) -> Estimate:
    """What is left of ``cells`` and about how long it takes. Opens the data and probes each model once."""
    left = list(cells) if store is None else to_run(cells, store, retry=retry)
    stays = {cell.key for cell in cells} - {cell.key for cell in left}
    found = [] if store is None else [store.load(cell.key).status for cell in cells if cell.key in stays]
    known = {} if store is None else measured(store, store.plans())
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in left:
        groups.setdefault((cell.names.data, cell.names.model, cell.names.method), []).append(cell)
    probes: dict[tuple[str, str], ClassifierProbe | ClipProbe] = {}
    parts = []
    for (data, model, method), members in groups.items():
        seconds = known.get((data, model, method))
        if seconds is None:
            if (data, model) not in probes:
                probes[data, model] = probe_model(members[0])
            seconds = guess(members[0], probes[data, model])
        what, is_measured = "victim" if method == GIVEN else method, (data, model, method) in known
        parts.append(
            Part(what=f"{data}, {model}: {what}", cells=len(members), seconds=seconds, measured=is_measured)
        )  # fmt: skip
    return Estimate(
        cells=len(cells), done=found.count("done"), failed=dict(Counter(found) - Counter(done=len(found))),
        parts=tuple(parts), basis=basis_of(parts),
    )  # fmt: skip


def basis_of(parts: Sequence[Part]) -> str:
    """Where the seconds are from, in words."""
    left, like = sum(part.cells for part in parts), sum(part.cells for part in parts if part.measured)
    if like == left:
        return "from cells that ran before"
    probed = "from a few probed batches"
    return f"{like} of {left} cells from like ones that ran before, the others {probed}" if like else probed


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
class ClassifierProbe:
    """What one data set and network were measured at; ``tested`` images are for the rates."""

    tested: int
    train: LabelledImages
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class ClipProbe:
    """A loaded CLIP with all of its pairs, ``clean`` before any poisoning and ``repair`` for the defenses that get
    clean ones. ``rebound``: seconds of what follows each repair."""

    tested: int
    clip: ImageTextModel
    reference: ImageTextModel
    clean: ImageTextPairs
    repair: ImageTextPairs
    rebound: float


def probe_model(cell: Cell) -> ClassifierProbe | ClipProbe:
    """Open the data, load the model and time a few batches."""
    data, run = cell.data, run_of(cell, None, Silent())
    tested, reference = len(open_images(data.test)), load_any_clip(cell.model.clip)
    if cell.model.kind == "classifier":
        train = open_images(data.train or "")
        network = new_classifier(cell.model.arch, train.class_names, image_size=cell.model.image_size)
        return ClassifierProbe(tested=tested, train=train, rates=probe(train, reference, network, run=run))
    clip, rebound = load_any_clip(cell.model.model), 0.0
    clean, repair = clean_pairs(data, None if data.captioned is None else open_pairs(data.captioned))
    if data.later is not None:
        later = pairs_of_labels(open_images(data.later), TEMPLATES)
        rebound = plan_clip_training(clip, later, FineTuningConfig(epochs=1), run=run, tested=tested).seconds
    return ClipProbe(tested=tested, clip=clip, reference=reference, clean=clean, repair=repair, rebound=rebound)


def guess(cell: Cell, known: ClassifierProbe | ClipProbe) -> float:
    """Seconds of one cell. Each repair counts the scores as its own, so that a grid that shares them takes less."""
    if isinstance(known, ClipProbe):
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


def _guess_clip(cell: Cell, known: ClipProbe) -> float:
    """By the plan of the same repair on its own, over the pairs that the cell has."""
    method, run = cell.method, run_of(cell, None, Silent())
    if method is None:
        victim = make_config(Settings, cell.model.victim, where="victim")
        config = PairTrainingConfig(
            steps=victim.steps, batch_size=victim.batch, chunk_size=victim.batch, held_out_pairs=1
        )  # fmt: skip
        return plan_clip_training(known.clip, known.clean, config, run=run, tested=known.tested).seconds
    needs = find(method.method, DEFENSES).needs
    if SHOTS in needs:
        shots, config = open_images(cell.data.shots or ""), clip_config(method, known.clip, 0)
        return plan_zero_shot(known.clip, shots, config, run=run, tested=known.tested).seconds
    pairs = known.clean if OWN_PAIRS in needs else known.repair
    config = clip_config(method, known.clip, len(pairs))
    reference = known.reference if isinstance(config, UBTConfig) else None
    plan = plan_clip_training(known.clip, pairs, config, run=run, tested=known.tested, reference=reference)
    return plan.seconds + known.rebound
