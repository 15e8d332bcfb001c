"""What cannot be in a grid: attacks and defenses on models that they do not fit, targets and models that are none.

Nothing is opened for it but the names of classes that a source says in its header.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from unpoison.attacks.pair_manifest import MODES as PAIR_MODES
from unpoison.attacks.triggers import make_trigger
from unpoison.benchmark.contents import class_counts, known_classes, looks_local, path_content
from unpoison.benchmark.prepare import PREPARED, PREPARED_WITH, SELECTED_WITH, THROUGH_PAR, training_of
from unpoison.benchmark.reading import read_table
from unpoison.benchmark.settings import SHOTS, AttackSettings, DataSettings, FurtherPart, ModelSettings, class_number
from unpoison.catalog import ATTACKS, Entry, find
from unpoison.errors import UnknownMethodError, UnpoisonError

OFFERED: dict[str, set[str]] = {
    "classifier": {"labelled set", "victim model", "poisoned training set", "reference CLIP", "class names"},
    "clip": {
        *("labelled set", "image-caption pairs", "suspicious CLIP", "suspicious pairs", "clean pairs"),
        *("reference CLIP", "class names"),
    },
}
"""What a cell of each kind of model can give to an attack or a method (words of the catalog's ``needs``)."""
_WORDS = {"clip": "CLIP", "classifier": "classifier"}


def said(check: Callable[[], object], where: str) -> list[str]:
    """What the check raises, as a problem."""
    try:
        check()
    except UnpoisonError as error:
        return [f"{where}: {error.message} {error.hint}"]
    return []


def check_attack(attack: AttackSettings, where: str) -> list[str]:
    """Triggers, and settings of them, that cannot be on any model: all of them."""
    problems = said(partial(find, attack.trigger, ATTACKS), where)
    if not problems:
        problems = _wrong_settings(attack, where)
    for part in attack.also:
        problems += said(partial(_check_trigger, part), where)
        if part.trigger in PREPARED_WITH:
            hint = "Give it as the first trigger."
            problems.append(f"{where}: also: {part.trigger} is trained beforehand. {hint}")
    return problems


def _wrong_settings(attack: AttackSettings, where: str) -> list[str]:
    """What is wrong with a trigger that there is, its parameters and its training."""
    problems = said(partial(_check_trigger, attack), where)
    if attack.through_par and attack.trigger != THROUGH_PAR:
        problems.append(f"{where}: {attack.trigger} is not trained through PAR. through_par is for {THROUGH_PAR}.")
    kind = PREPARED.get(attack.trigger) if attack.trigger != THROUGH_PAR else training_of(attack)
    if kind is not None:
        return problems + read_table(attack.prepare, kind, f"{where}: prepare").problems
    if attack.prepare:
        known = ", ".join(PREPARED)
        problems.append(f"{where}: {attack.trigger} is not trained beforehand. prepare is for {known}.")
    return problems


def _check_trigger(part: AttackSettings | FurtherPart) -> None:
    find(part.trigger, ATTACKS)
    make_trigger(part.trigger, part.params | ({"resample": True} if part.resample else {}))


def impossible_attack(name: str, known: tuple[AttackSettings, Entry], model: str, settings: ModelSettings) -> list[str]:
    """Why the attack, or a further part of it, cannot be made on this model: all reasons."""
    attack, entry = known
    problems = _impossible_part(name, attack, entry, model, settings)
    for part in attack.also:
        try:
            further = find(part.trigger, ATTACKS)
        except UnknownMethodError:
            continue  # said of its table
        problems += _impossible_part(f"{name}: also: {part.trigger}", part, further, model, settings)
    wanted = SELECTED_WITH.get(attack.select, settings.kind)
    if wanted != settings.kind:
        problems.append(f"{name}: select = {attack.select!r} is for a {_WORDS[wanted]}, not {model}.")
    wanted = PREPARED_WITH.get(attack.trigger, settings.kind)
    if wanted != settings.kind:
        problems.append(f"{name} is trained on a {_WORDS[wanted]}; {model} is none.")
    return problems


def _impossible_part(
    name: str, part: AttackSettings | FurtherPart, entry: Entry, model: str, settings: ModelSettings
) -> list[str]:
    if lacks := lacking(entry, settings.kind):
        return [f"{name} needs {lacks}, which the {kind_of(settings)} {model} has not."]
    try:
        made = make_trigger(part.trigger, part.params)
    except UnpoisonError:
        return []  # said of its table
    usable = [mode for mode in made.modes if settings.kind == "classifier" or mode in PAIR_MODES]
    if not usable:
        return [f"{name} works on labels ({', '.join(made.modes)}); {model} is a CLIP and learns from captions."]
    if part.mode is not None and part.mode not in usable:
        return [f"{name} has no mode {part.mode!r} on the {kind_of(settings)} {model}. It has: {', '.join(usable)}."]
    return []


def lacking(entry: Entry, kind: str, data: DataSettings | None = None) -> str:
    """What an attack or a defense needs that cells of this kind of model have not, in words; "" where it has all."""
    offered = OFFERED[kind] | ({SHOTS} if kind == "clip" and data is not None and data.shots is not None else set())
    return ", ".join(need for need in entry.needs if need not in offered)


def kind_of(settings: ModelSettings) -> str:
    return _WORDS[settings.kind]


def wrong_targets(data: DataSettings, model: ModelSettings, attack: AttackSettings | None) -> list[str]:
    """Targets that are no class of the set that names the classes, as far as its header tells."""
    source = data.train if model.kind == "classifier" else data.test
    try:
        classes = None if source is None else known_classes(source)
    except UnpoisonError:
        return []  # said of its source
    if classes is None:
        return []
    further = () if attack is None else attack.also
    targets = [("target", data.target), *((f"also: {part.trigger}", part.target) for part in further)]
    found = [said(partial(class_number, target, classes), where) for where, target in targets]
    return [problem for problems in found for problem in problems]


def lacking_captions(name: str, attack: AttackSettings, data: str, settings: DataSettings) -> list[str]:
    """Why a CLIP's attack cannot have real captions: sets of labelled images have filled templates alone."""
    if settings.captioned is not None:
        return []
    asked = {"captions": attack.captions != "templates", "select": attack.select == "captions"}
    return [
        f"{name}: {key} = {getattr(attack, key)!r} needs real captions; give [data.{data}] captioned."
        for key, wanted in asked.items()
        if wanted
    ]


def overfull(name: str, attack: AttackSettings, rate: float, data: DataSettings, model: ModelSettings) -> list[str]:
    """Why a share of the set cannot be poisoned: there is not so much of it or, where a classifier's set says its
    labels cheaply, not of the samples that the labeling takes."""
    parts = {name: (attack, rate, data.target)}
    parts |= {f"{name}: also {at}": (part, part.rate, part.target) for at, part in enumerate(attack.also, start=1)}
    shares = [share for _, share, _ in parts.values()]
    problems = []
    if attack.also and sum(shares) > 1 + 1e-9:
        added = " + ".join(f"{share:g}" for share in shares)
        problems.append(f"{name} at a rate of {rate:g} poisons {added} of the set, which is more than all of it.")
    try:
        classes = known_classes(data.train or "") if model.kind == "classifier" else None
        counts = None if classes is None else class_counts(data.train or "")
    except UnpoisonError:
        return problems  # said of its source
    if classes is None or counts is None:
        return problems
    for where, (part, share, target) in parts.items():
        try:
            label, mode = class_number(target, classes), part.mode or make_trigger(part.trigger, part.params).modes[0]
        except UnpoisonError:
            continue  # said of its table
        size, need, clean = int(counts.sum()), max(1, round(share * counts.sum())), mode == "clean-label"
        usable = int(counts[label]) if clean else size if mode == "all-to-all" else size - int(counts[label])
        if need > usable:
            which = f"{'in' if clean else 'outside'} the class {classes[label]!r}"
            problems.append(f"{where} at a rate of {share:g} poisons {need:,} samples {which}, of {usable:,} there.")
    return problems


def missing_clip(model: str) -> list[str]:
    """Why there can be no CLIP of this name; what a hub holds is not asked."""
    if model == "tiny" or ":" in model or path_content(Path(model)) is not None:
        return []
    if looks_local(model):
        return [f"{model} is not there."]
    if "/" in model:
        return []
    return [f"there is no CLIP {model!r}: give 'tiny', a folder or file, open_clip:NAME/TAG, or a hub id (OWNER/NAME)."]
