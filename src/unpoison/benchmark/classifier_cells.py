"""Cells of classifiers: a new network trained on the poisoned set, and a defense that gets the model and that set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unpoison.api import PurifyOutcome
from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.parts import Part, PoisoningParts, apply_parts, load_labelled, plan_parts
from unpoison.attacks.poison import apply_poisoning, trigger_test_source
from unpoison.attacks.selection import RANDOM
from unpoison.benchmark.cell import Cell, CellResult, Cost, Repaired
from unpoison.benchmark.outcomes import call_with, changed_share, cost_of, done, figures, side_by_side
from unpoison.benchmark.prepare import (
    PERTURBED,
    fitted,
    further_part,
    labelled_params,
    labelled_selection,
    perturbed_samples,
)
from unpoison.benchmark.settings import MethodSettings, class_number
from unpoison.benchmark.shared import Step, Stopwatch, run_of, shared
from unpoison.catalog import DEFENSES, find, resolve
from unpoison.configs import make_config, merge
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.cgd import CGDConfig
from unpoison.detection.cgd import SeparationConfig, score_with_cgd
from unpoison.detection.thresholds import split_by_evidence
from unpoison.evaluation.classifier import evaluate_before_after, evaluate_classifier, labelled_parts
from unpoison.evaluation.metrics import auroc, precision, recall
from unpoison.models.classifier import ImageClassifier, load_classifier, new_classifier, save_classifier
from unpoison.models.clip_files import load_any_clip
from unpoison.models.zero_shot import zero_shot_logits
from unpoison.results import Evaluation, SampleScores, SkippedRow, Split
from unpoison.runs import Progress, Run, RunFolder
from unpoison.training import train_classifier


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of one victim share. ``poisoning`` None: the clean control."""

    cell: Cell
    folder: Path
    run: Run
    train: LabelledImages
    poisoning: Poisoning | PoisoningParts | None
    inputs: dict[str, Any]

    @property
    def shared(self) -> Path:
        return self.folder / "shared"


def classifier_cell(cell: Cell, folder: Path, progress: Progress) -> CellResult:
    """The cell's result. Raises what its steps raise."""
    setting = open_setting(cell, folder, progress)
    test = open_images(cell.data.test)
    victim_step = _victim(setting)
    victim = load_classifier(victim_step.path / "model")
    before = _evaluation(setting, victim_step, victim, test)
    prints = {"train": setting.train.fingerprint(), "test": test.fingerprint(), "victim": victim_step.key}
    if cell.method is None:
        return done(
            cell, before=figures(before), after=figures(before), fingerprints=prints,
            cost=cost_of(victim_step), picture=_picture(setting, test),
        )  # fmt: skip
    outcome, own, scored = _repair(setting, victim, cell.method)
    after = evaluate_classifier(outcome.classifier, test, poisoning=setting.poisoning, run=setting.run)
    found = outcome.purification
    changed = changed_share(victim.weights(), outcome.classifier.weights())
    repaired = Repaired(
        accepted=found.accepted,
        reason=found.reason,
        protects=found.protects,
        changed_share=changed,
        left_alone=changed == 0 and found.clipped_sites == 0,
        der=evaluate_before_after(before, after),
        config=found.config,
        detection=_detection(setting, outcome.split, outcome.scores if cell.method.method == "cgd" else None),
    )
    return done(
        cell, before=figures(before), after=figures(after), repaired=repaired, fingerprints=prints,
        cost=with_scores(own, scored),
    )  # fmt: skip


def open_setting(cell: Cell, folder: Path, progress: Progress) -> Setting:
    """The set, poisoned where there is an attack; the poisoning is made once. Label-Consistent first perturbs its
    samples against the clean victim of the same model and seed."""
    run = run_of(cell, folder, progress)
    clean = open_images(cell.data.train or "")
    seed, target = cell.names.seed, class_number(cell.data.target, clean.class_names)
    inputs: dict[str, Any] = {"kind": "classifier", "train": clean.fingerprint(), "seed": seed} | cell.named_precision
    attack = cell.attack
    if attack is None:
        return Setting(cell=cell, folder=folder, run=run, train=clean, poisoning=None, inputs=inputs)
    without_attack = dict(inputs)
    inputs |= {"attack": attack.inputs(), "rate": cell.names.rate, "target": target}
    if attack.select != RANDOM:
        inputs["attackers"] = cell.model.clip

    def plan(place: RunFolder) -> None:
        made = replace(run, folder=place)
        selection = labelled_selection(attack, clean, target, cell.model.clip, run=made)
        options = {"mode": attack.mode, "selection": selection, **labelled_params(attack, clean, target, run=made)}
        first = Part(trigger=attack.trigger, target=target, rate=cell.names.rate, options=options)
        more = [further_part(part, class_number(part.target, clean.class_names)) for part in attack.also]
        parts = labelled_parts(plan_parts(clean, [first, *more], seed=seed))
        parts[0] = fitted(attack, clean, parts[0], run=made)
        whole = PoisoningParts(parts=tuple(parts)) if more else parts[0]
        whole.save(place.path / "manifest.json")

    step = shared(folder / "shared", "poisoning", inputs, plan)
    poisoning = load_labelled(step.path / "manifest.json")
    several = isinstance(poisoning, PoisoningParts)
    start = clean
    if attack.trigger == PERTURBED:
        control = Setting(cell=cell, folder=folder, run=run, train=clean, poisoning=None, inputs=without_attack)
        surrogate = _victim(control)
        inputs["surrogate"] = surrogate.key
        first = labelled_parts(poisoning)[0]
        start = perturbed_samples(attack, clean, first, load_classifier(surrogate.path / "model"))
    poisoned = apply_parts(start, poisoning) if several else apply_poisoning(start, poisoning)
    return Setting(cell=cell, folder=folder, run=run, train=poisoned, poisoning=poisoning, inputs=inputs)


def victim_of(setting: Setting) -> Path:
    """The victim as it is stored, made now or found: a classifier's folder."""
    return _victim(setting).path / "model"


def _victim(setting: Setting) -> Step:
    """The network trained on the set, as it is stored."""
    model = setting.cell.model
    network = {key: getattr(model, key) for key in ("arch", "image_size", "epochs", "learning_rate", "augment")}

    def train(place: RunFolder) -> None:
        run = replace(setting.run, folder=place)
        start = new_classifier(
            model.arch, setting.train.class_names, image_size=model.image_size, seed=run.seed_of("victim") % 2**32
        )
        pixels = load_pixels(setting.train, model.image_size, cache=run.cache, progress=run.progress)
        victim = train_classifier(
            start, pixels, setting.train.labels, run=run, epochs=model.epochs, learning_rate=model.learning_rate,
            augment=model.augment,
        )  # fmt: skip
        save_classifier(victim, place.path / "model")

    return shared(setting.shared, "victim", setting.inputs | {"network": network}, train)


def _evaluation(setting: Setting, victim_step: Step, victim: ImageClassifier, test: LabelledImages) -> Evaluation:
    """The victim's rates, measured once for all repairs of it."""

    def measure(place: RunFolder) -> None:
        evaluate_classifier(victim, test, poisoning=setting.poisoning, run=setting.run).save(
            place.path / "evaluation.json"
        )

    step = shared(setting.shared, "evaluation", {"victim": victim_step.key, "test": test.fingerprint()}, measure)
    return Evaluation.load(step.path / "evaluation.json")


def _scores(setting: Setting, config: SeparationConfig) -> Step:
    """CGD's ranks of the set, made now or earlier."""
    model = setting.cell.model
    clip = load_any_clip(model.clip)
    inputs = setting.inputs | {
        "clip": clip.fingerprint, "arch": model.arch, "image_size": model.image_size, "separation": asdict(config)
    }  # fmt: skip

    def score(place: RunFolder) -> None:
        run = replace(setting.run, folder=place)
        zero_shot = zero_shot_logits(clip, setting.train, run=run)
        pixels = load_pixels(setting.train, model.image_size, cache=run.cache, progress=run.progress)
        fresh = new_classifier(model.arch, setting.train.class_names, image_size=model.image_size)
        score_with_cgd(fresh, setting.train, pixels, zero_shot, config, run=run).save(place.path / "scores.parquet")

    return shared(setting.shared, "scores", inputs, score)


def _repair(setting: Setting, victim: ImageClassifier, method: MethodSettings) -> tuple[PurifyOutcome, Cost, Step]:
    """What the method made of the victim, what it took by itself, and the shared scores that it asked for."""
    entry, cell = find(method.method, DEFENSES), setting.cell
    config = method_config(method, len(setting.train), cell.model.scores)
    separation = make_config(SeparationConfig, cell.model.scores, where="scores")
    if isinstance(config, CGDConfig):
        separation = config.separation
    scored = _scores(setting, separation)
    scores = SampleScores.load(scored.path / "scores.parquet")
    run = replace(setting.run, folder=RunFolder.open(setting.folder / "work" / cell.key, cell.inputs))
    split = split_by_evidence(scores, odd=getattr(config, "odd_labels", "leave-out"))
    offered = {"clip": load_any_clip(cell.model.clip), "scores": scores, "split": split, "config": config, "run": run}
    watch = Stopwatch()
    outcome = call_with(resolve(entry.function), victim, setting.train, offered=offered)
    return outcome, Cost(seconds=watch.seconds, processor=watch.processor), scored


def with_scores(own: Cost, scored: Step) -> Cost:
    """What a method took, with the scores it needed."""
    processor = None if own.processor is None or scored.processor is None else own.processor + scored.processor
    return replace(
        own, seconds=own.seconds + scored.seconds, processor=processor, shared=scored.seconds, resumed=scored.resumed
    )


def method_config(method: MethodSettings, samples: int, scores: Mapping[str, Any]) -> Any:
    """The defense's settings: its own or the paper's, then ``scores`` where it is CGD, then the grid's."""
    kind = resolve(find(method.method, DEFENSES).config)
    start: dict[str, Any] = {}
    if method.published and hasattr(kind, "as_published"):
        more = {"samples": samples} if kind is CGDConfig else {}
        start = asdict(kind.as_published(**more))
    elif kind is CGDConfig:
        start = {"separation": scores}
    return make_config(kind, merge(start, method.config), where=f"method {method.method}")


def _detection(setting: Setting, split: Split, scores: SampleScores | None) -> dict[str, float | None]:
    """How the samples that the method suspected meet the manifest, in percent. ``scores``: its own, whose AUROC in
    [0, 1] is wanted; None for a method that was fed with those of another."""
    if setting.poisoning is None:
        return {"flagged": 100 * len(split.suspect) / max(1, len(split.ids))}
    truth = np.isin(split.ids, setting.poisoning.ids)
    flagged = np.zeros(len(truth), dtype=bool)
    flagged[split.suspect] = True
    trusted = np.zeros(len(truth), dtype=bool)
    trusted[split.clean] = True
    targets = [
        label
        for part in labelled_parts(setting.poisoning)
        for name, label in zip(part.ids, part.new_labels, strict=True)
        if name not in part.covers
    ]
    of_target = trusted & np.isin(split.labels, targets)
    known = {"recall": recall(flagged, truth), "precision": precision(flagged, truth) if flagged.any() else None}
    shares = {name: None if value is None else 100 * value for name, value in known.items()}
    return shares | {
        "flagged": 100 * float(flagged.mean()),
        "poison_in_clean": 100 * float(truth[trusted].mean()) if trusted.any() else None,
        "target_purity": 100 * float((~truth[of_target]).mean()) if of_target.any() else None,
        **({} if scores is None else {"auroc": auroc(scores.suspicion, truth)}),
    }


def _picture(setting: Setting, test: LabelledImages) -> str | None:
    """The first attacked test image without and with the trigger."""
    if setting.poisoning is None:
        return None
    triggered, rows, _ = trigger_test_source(test, labelled_parts(setting.poisoning)[0])
    clean, turned = test.decode(rows[:1])[0], triggered.decode([0])[0]
    if isinstance(clean, SkippedRow) or isinstance(turned, SkippedRow):
        return None
    return side_by_side(clean, turned)
