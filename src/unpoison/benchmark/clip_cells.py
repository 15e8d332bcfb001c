"""Cells of CLIPs: one fine-tuned on poisoned pairs, and a defense that gets it with clean pairs or with those.

Defenses that repair a zero-shot classifier get a few clean labelled images instead and leave the weights alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unpoison.api_clip import ClipPurifyOutcome, count_parameters, purify_with_fine_tuning
from unpoison.api_zero_shot import ZeroShotOutcome
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.pairs import apply_pair_poisoning
from unpoison.attacks.parts import Part, PoisoningParts, apply_pair_parts, load_manifest, plan_pair_parts
from unpoison.attacks.poison import TriggerOverlay
from unpoison.attacks.prompts import TEMPLATES
from unpoison.attacks.triggers import PAIR_TRIGGERS
from unpoison.benchmark.cell import Cell, CellResult, Cost, Figures, Repaired
from unpoison.benchmark.clip_victims import Settings, read_corpus, train
from unpoison.benchmark.outcomes import call_with, changed_share, cost_of, done, figures, side_by_side
from unpoison.benchmark.prepare import further_part, pair_params, pair_selection
from unpoison.benchmark.settings import SHOTS, DataSettings, MethodSettings, class_number
from unpoison.benchmark.shared import Step, Stopwatch, run_of, shared
from unpoison.catalog import DEFENSES, find, resolve
from unpoison.configs import make_config, merge
from unpoison.data.pairs import ImageTextPairs, join_pairs, open_pairs, pairs_of_labels
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.fine_tuning import FineTuningConfig
from unpoison.errors import ConfigError
from unpoison.evaluation.clip import evaluate_clip, rebound
from unpoison.evaluation.metrics import auroc, der, precision, recall
from unpoison.models.clip_files import load_any_clip
from unpoison.results import ClipEvaluation, SkippedRow
from unpoison.runs import Progress, Run, RunFolder
from unpoison.types import ImageTextModel

LABELLED, CAPTIONED = "labelled", "captioned"
OWN_PAIRS = "suspicious pairs"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of one victim share. ``clean``: the training pairs before the poisoning, ``repair``: those that
    a defense gets as clean. ``poisoning`` None: the clean control."""

    cell: Cell
    folder: Path
    run: Run
    base: ImageTextModel
    clean: ImageTextPairs
    pairs: ImageTextPairs
    repair: ImageTextPairs
    test: LabelledImages
    retrieval: ImageTextPairs | None
    poisoning: PairPoisoning | PoisoningParts | None
    inputs: dict[str, Any]

    @property
    def shared(self) -> Path:
        return self.folder / "shared"


def clip_cell(cell: Cell, folder: Path, progress: Progress) -> CellResult:
    """The cell's result. Raises what its steps raise."""
    setting = open_setting(cell, folder, progress)
    victim_step = _victim(setting)
    victim = load_any_clip(victim_step.path / "model")  # as stored: rounded to the type that it came in
    before = _evaluation(setting, victim_step, victim)
    prints = {
        "pairs": setting.pairs.caption_fingerprint,
        "test": setting.test.fingerprint(),
        "victim": victim.fingerprint,
    }
    if cell.method is None:
        return done(
            cell, before=figures(before), after=figures(before), fingerprints=prints,
            cost=cost_of(victim_step), picture=_picture(setting),
        )  # fmt: skip
    outcome, cost = _repair(setting, victim, cell.method)
    repaired_clip, classes = _parts(outcome)
    after = evaluate_clip(
        repaired_clip, setting.test, classes=classes, poisoning=setting.poisoning, retrieval=setting.retrieval,
        suspect=victim, run=setting.run,
    )  # fmt: skip
    found = outcome.purification
    repaired = Repaired(
        accepted=found.accepted,
        reason=found.reason,
        protects=found.protects,
        changed_share=changed_share(victim.module.state_dict(), repaired_clip.module.state_dict()),
        left_alone=found.left_alone,
        der=_der(figures(before), figures(after)),
        config=found.config,
        detection=_detection(setting, outcome),
        rebound=None if isinstance(outcome, ZeroShotOutcome) else _rebound(setting, outcome.clip, after),
    )
    return done(
        cell, before=figures(before), after=figures(after), repaired=repaired, fingerprints=prints,
        cost=cost,
    )  # fmt: skip


def victim_of(setting: Setting) -> Path:
    """The victim as it is stored, made now or found: a model's folder."""
    return _victim(setting).path / "model"


def open_setting(cell: Cell, folder: Path, progress: Progress) -> Setting:
    """Pairs, poisoned where there is an attack; the poisoning, and the trigger's training, are made once."""
    data, seed, attack = cell.data, cell.names.seed, cell.attack
    run = run_of(cell, folder, progress)
    base = load_any_clip(cell.model.model)
    test = open_images(data.test)
    captioned = None if data.captioned is None else open_pairs(data.captioned)
    clean, repair = clean_pairs(data, captioned)
    inputs: dict[str, Any] = {
        "kind": "clip",
        "pairs": clean.caption_fingerprint,
        "base": base.fingerprint,
        "seed": seed,
    } | cell.named_precision
    target = test.class_names[class_number(data.target, test.class_names)]
    known: dict[str, Any] = {
        "cell": cell, "folder": folder, "run": run, "base": base, "clean": clean, "repair": repair,
        "test": test, "retrieval": None if data.retrieval is None else open_pairs(data.retrieval),
    }  # fmt: skip
    if attack is None:
        return Setting(**known, pairs=clean, poisoning=None, inputs=inputs)
    inputs |= {"attack": attack.inputs(), "rate": cell.names.rate, "target": target}

    def plan(place: RunFolder) -> None:
        made = replace(run, folder=place)
        options = {
            "mode": attack.mode, "captions": attack.captions, "natural_from": captioned, "run": made,
            "most_captions": attack.most_captions,
            "size": None if attack.trigger in PAIR_TRIGGERS else base.image_size,
            "surrogate": base if attack.captions == "aligned" else None,
            "selection": pair_selection(attack, base, clean, captioned, target, run=made),
            **pair_params(attack, base, clean, target, run=made),
        }  # fmt: skip
        first = Part(trigger=attack.trigger, target=target, rate=cell.names.rate, options=options)
        more = [
            further_part(
                part, test.class_names[class_number(part.target, test.class_names)], natural_from=captioned,
                size=None if part.trigger in PAIR_TRIGGERS else base.image_size,
            )
            for part in attack.also
        ]  # fmt: skip
        parts = plan_pair_parts(clean, [first, *more], seed=seed)
        whole = parts if more else parts.parts[0]
        whole.save(place.path / "manifest.json")

    step = shared(folder / "shared", "poisoning", inputs, plan)
    poisoning = load_manifest(step.path / "manifest.json")
    if isinstance(poisoning, Poisoning):
        raise ConfigError(f"{step.path} holds a poisoning of labelled images.", hint="Remove that folder.")
    several = isinstance(poisoning, PoisoningParts)
    poisoned = apply_pair_parts(clean, poisoning) if several else apply_pair_poisoning(clean, poisoning)
    return Setting(**known, pairs=poisoned, poisoning=poisoning, inputs=inputs)


def clean_pairs(data: DataSettings, captioned: ImageTextPairs | None) -> tuple[ImageTextPairs, ImageTextPairs]:
    """What a CLIP is trained on, before any poisoning, and what a defense gets as clean: the same, unless the data name
    others. ``captioned``: those of ``data``, opened."""
    clean = _joined(None if data.train is None else open_images(data.train), captioned)
    if data.clean is None and data.clean_captioned is None:
        return clean, clean
    images = None if data.clean is None else open_images(data.clean)
    return clean, _joined(images, None if data.clean_captioned is None else open_pairs(data.clean_captioned))


def _parts_of(poisoning: Any) -> list[PairPoisoning]:
    parts = poisoning.parts if isinstance(poisoning, PoisoningParts) else (poisoning,)
    return [part for part in parts if isinstance(part, PairPoisoning)]


def _joined(labelled: LabelledImages | None, captioned: ImageTextPairs | None) -> ImageTextPairs:
    parts = {} if labelled is None else {LABELLED: pairs_of_labels(labelled, TEMPLATES)}
    return join_pairs(parts | ({} if captioned is None else {CAPTIONED: captioned}))


def _victim(setting: Setting) -> Step:
    """The CLIP fine-tuned on the pairs, as it is stored."""
    settings = make_config(Settings, setting.cell.model.victim, where="victim")

    def fine_tune(place: RunFolder) -> None:
        run = replace(setting.run, folder=place)
        pixels = load_pixels(setting.pairs, setting.base.image_size, cache=run.cache, progress=run.progress)
        corpus = read_corpus(setting.pairs, pixels, LABELLED, setting.test.class_names)
        train(setting.base, corpus, settings, run=run).save(place.path / "model")

    return shared(setting.shared, "victim", setting.inputs | {"victim": asdict(settings)}, fine_tune)


def _evaluation(setting: Setting, step: Step, victim: ImageTextModel) -> ClipEvaluation:
    """The victim's rates, measured once for all repairs of it."""

    def measure(place: RunFolder) -> None:
        found = evaluate_clip(
            victim, setting.test, poisoning=setting.poisoning, retrieval=setting.retrieval, run=setting.run
        )
        found.save(place.path / "evaluation.json")

    retrieval = None if setting.retrieval is None else setting.retrieval.caption_fingerprint
    inputs = {"victim": step.key, "test": setting.test.fingerprint(), "retrieval": retrieval}
    return ClipEvaluation.load(shared(setting.shared, "evaluation", inputs, measure).path / "evaluation.json")


def _repair(
    setting: Setting, victim: ImageTextModel, method: MethodSettings
) -> tuple[ClipPurifyOutcome | ZeroShotOutcome, Cost]:
    """What the method made of the victim, and what it took. It gets the victim's own pairs, clean ones or shots."""
    entry, cell = find(method.method, DEFENSES), setting.cell
    data = setting.pairs if OWN_PAIRS in entry.needs else setting.repair
    if SHOTS in entry.needs:
        data = open_images(cell.data.shots or "")
    config = method_config(method, victim, len(data))
    run = replace(setting.run, folder=RunFolder.open(setting.folder / "work" / cell.key, cell.inputs))
    offered = {
        "reference": load_any_clip(cell.model.clip), "class_names": setting.test.class_names, "config": config,
        "run": run,
    }  # fmt: skip
    watch = Stopwatch()
    outcome = call_with(resolve(entry.function), victim, data, offered=offered)
    return outcome, Cost(seconds=watch.seconds, processor=watch.processor)


def _parts(outcome: ClipPurifyOutcome | ZeroShotOutcome) -> tuple[ImageTextModel, np.ndarray | None]:
    """The repaired CLIP, and the classes' embeddings where they are not what it makes of their names."""
    if isinstance(outcome, ZeroShotOutcome):
        return outcome.classifier.clip, outcome.classifier.classes.numpy()
    return outcome.clip, None


def method_config(method: MethodSettings, clip: ImageTextModel, samples: int) -> Any:
    """The defense's settings for this model and these pairs, and the grid's over them."""
    kind = resolve(find(method.method, DEFENSES).config)
    where = f"method {method.method}"
    if not hasattr(kind, "scaled"):
        start = kind.as_published() if method.published and hasattr(kind, "as_published") else kind()
        return make_config(kind, merge(asdict(start), method.config), where=where)
    checked = make_config(kind, method.config, where=where)
    lengths = {name: getattr(checked, name) for name in ("batch_size", "epochs") if name in method.config}
    make = kind.paper if method.published else kind.recommended
    start = asdict(make(parameters=count_parameters(clip), samples=samples, **lengths))
    return make_config(kind, merge(start, method.config), where=where)


def _rebound(setting: Setting, clip: ImageTextModel, after: ClipEvaluation) -> Figures | None:
    """The repaired CLIP after an epoch of fine-tuning on other clean images, as its next owner would do."""
    cell = setting.cell
    if cell.data.later is None:
        return None
    place = RunFolder.open(setting.folder / "work" / cell.key / "rebound", cell.inputs)

    def fine_tune(clip: ImageTextModel, pairs: ImageTextPairs) -> ImageTextModel:
        config = FineTuningConfig.scaled(parameters=count_parameters(clip), samples=len(pairs), epochs=1)
        return purify_with_fine_tuning(clip, pairs, config=config, run=replace(setting.run, folder=place)).clip

    def evaluate(clip: ImageTextModel) -> ClipEvaluation:
        return evaluate_clip(clip, setting.test, poisoning=setting.poisoning, run=setting.run)

    pairs = pairs_of_labels(open_images(cell.data.later), TEMPLATES)
    return figures(rebound(clip, pairs, fine_tune, evaluate=evaluate, before=after).after)


def _detection(setting: Setting, outcome: ClipPurifyOutcome | ZeroShotOutcome) -> dict[str, float | None]:
    """How what the method suspected, pairs or classes, meets the manifest; empty where it looked for nothing."""
    if isinstance(outcome, ZeroShotOutcome):
        found, poisoning = outcome.purification, setting.poisoning
        if found.search is None:
            return {}
        targets = {part.target_name for part in _parts_of(poisoning)} if poisoning is not None else set()
        named = {
            "target_found": 100.0 * (targets <= set(found.targets)),
            "target_exact": 100.0 * (targets == set(found.targets)),
        } if targets else {}  # fmt: skip
        return {"suspected": float(len(found.targets)), **named}
    suspicious = getattr(outcome, "suspicious", None)
    if suspicious is None:
        search = outcome.purification.search
        return {} if search is None else {"suspected": float(len(search.suspected))}
    scores, split = suspicious.scores, suspicious.split
    flagged = np.zeros(len(scores.ids), dtype=bool)
    flagged[split.suspect] = True
    shares: dict[str, float | None] = {"flagged": 100 * float(flagged.mean())}
    exposure = outcome.purification.exposure
    if exposure is not None:
        shares["unlearnt"] = 100 * (exposure.unlearnt + exposure.judges) / len(scores.ids)
    if setting.poisoning is None:
        return shares
    truth = np.isin(scores.ids, setting.poisoning.ids)
    found = {"recall": recall(flagged, truth), "precision": precision(flagged, truth) if flagged.any() else None}
    shares |= {name: None if value is None else 100 * value for name, value in found.items()}
    return shares | {"auroc": auroc(scores.suspicion, truth)}


def _der(before: Figures, after: Figures) -> float | None:
    if before.asr is None or after.asr is None:
        return None
    return 100 * der(
        c_acc_before=before.c_acc.value / 100, c_acc_after=after.c_acc.value / 100,
        asr_before=before.asr.value / 100, asr_after=after.asr.value / 100,
    )  # fmt: skip


def _picture(setting: Setting) -> str | None:
    """The first test image without and with the trigger; None for attacks that change no pixel."""
    poisoning = None if setting.poisoning is None else _parts_of(setting.poisoning)[0]
    if poisoning is None or poisoning.trigger in PAIR_TRIGGERS:
        return None
    test = setting.test.select([0])
    clean = test.decode([0])[0]
    turned = test.with_labels(test.labels, TriggerOverlay(poisoning.make_trigger(), poisoning.seed, None)).decode([0])[
        0
    ]
    if isinstance(clean, SkippedRow) or isinstance(turned, SkippedRow):
        return None
    return side_by_side(clean, turned)
