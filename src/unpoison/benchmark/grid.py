"""Grids: data x model x attack x rate x method x seed, from a TOML file to a list of cells.

All that is wrong with a grid is found before anything runs and reported together: keys and names that do not exist
(with the closest that do), values out of range, cells that cannot be (by ``needs`` in the catalog), files that are
not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

from unpoison.benchmark.cell import DEFAULTS, Cell, Names
from unpoison.benchmark.checks import (
    check_attack,
    impossible_attack,
    kind_of,
    lacking,
    lacking_captions,
    missing_clip,
    overfull,
    said,
    wrong_targets,
)
from unpoison.benchmark.clip_victims import Settings as ClipVictim
from unpoison.benchmark.contents import looks_local, method_defaults, path_content, source_content
from unpoison.benchmark.reading import read_table
from unpoison.benchmark.settings import (
    CLEAN,
    GIVEN,
    MEAN,
    MOST,
    SHOTS,
    AttackSettings,
    DataSettings,
    Limits,
    MethodSettings,
    ModelSettings,
    Precision,
    Product,
    Reported,
)
from unpoison.catalog import ATTACKS, DEFENSES, find, resolve
from unpoison.configs import read_config
from unpoison.detection.cgd import SeparationConfig
from unpoison.errors import GridError, UnknownMethodError
from unpoison.models.classifier import check_architecture

T = TypeVar("T")
TABLES: dict[str, type] = {
    "data": DataSettings, "model": ModelSettings, "attack": AttackSettings, "method": MethodSettings,
}  # fmt: skip
KEYS = ("description", "not_run", "least_asr", "precision", "limits", "cells", "reported", *TABLES)
LEAST_ASR = 90.0


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A checked grid. ``cells`` are in the order of the file, each victim as given before its repairs.

    ``not_run``: why no results of this grid are kept with it, "" where they are. ``least_asr``: a victim whose ASR in
    percent is below is refused. ``reported``: figures of papers, shown beside ours.
    """

    name: str
    path: str
    description: str
    not_run: str
    cells: tuple[Cell, ...]
    reported: tuple[Reported, ...] = ()


def read_grid(path: Path) -> Grid:
    """The grid of a TOML file. Raises ConfigError (no TOML), GridError with all that is wrong."""
    return make_grid(read_config(path), name=path.stem, path=str(path))


def make_grid(values: Mapping[str, Any], *, name: str, path: str) -> Grid:
    """The same of tables that are read already."""
    problems = [f"the grid: there is no key {key!r}.{_closest(key, KEYS)}" for key in values if key not in KEYS]
    tables = Tables.read(values, problems)
    limits = _one(values.get("limits", {}), Limits, "[limits]", problems) or Limits()
    least = values.get("least_asr", LEAST_ASR)
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 100:
        problems.append(f"least_asr must be a number from 0 to 100, got {least!r}.")
        least = LEAST_ASR
    precision = values.get("precision", "no")
    if precision not in get_args(Precision):
        problems.append(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}.")
        precision = "no"
    texts = {key: values.get(key, "") for key in ("description", "not_run")}
    problems += [f"{key} must be a text, got {text!r}." for key, text in texts.items() if not isinstance(text, str)]
    products = values.get("cells", [])
    if not isinstance(products, list) or not products:
        problems.append("there is no [[cells]]: name data, model, attack, method and seed of at least one product.")
        products = []
    wanted = [_one(entry, Product, f"[[cells]] {at}", problems) for at, entry in enumerate(products, start=1)]
    _check_tables(tables, problems)
    cells: dict[Names, Cell] = {}
    for at, entry in enumerate(wanted, start=1):
        if entry is not None:
            found = _cells(entry, tables, f"[[cells]] {at}", problems)
            common = {"least_asr": float(least), "precision": precision, "limits": limits}
            cells |= {cell.names: replace(cell, **common) for cell in found if cell.names not in cells}
    reported = _reported(values.get("reported", []), wanted, problems)
    _check_files(cells.values(), problems)
    if problems:
        raise GridError(path, dict.fromkeys(problems))
    return Grid(
        name=name, path=path, **texts, cells=tuple(_with_contents(cell) for cell in cells.values()), reported=reported,
    )  # fmt: skip


def _reported(values: Any, products: Sequence[Product | None], problems: list[str]) -> tuple[Reported, ...]:
    """Figures of papers, of methods and attacks that the grid has; where a product cannot be read nobody knows."""
    if not isinstance(values, list):
        problems.append("reported: expected tables [[reported]].")
        return ()
    known = [entry for entry in products if entry is not None]
    methods = sorted({GIVEN, *(name for entry in known for name in entry.method)})
    attacks = sorted({name for entry in known for name in entry.attack})
    found, all_known = [], len(known) == len(products)
    for at, value in enumerate(values, start=1):
        where = f"[[reported]] {at}"
        entry = _one(value, Reported, where, problems)
        if entry is None:
            continue
        found.append(entry)
        if all_known and entry.method not in methods:
            problems.append(f"{where}: no cell has the method {entry.method!r}.{_closest(entry.method, methods)}")
        if MOST in entry.c_acc:
            problems.append(f"{where}: {MOST!r} is a bound on ASRs; c_acc has none.")
        unknown = [name for name in (*entry.asr, *entry.c_acc) if name not in (MEAN, MOST, *attacks)]
        if all_known:
            problems += [f"{where}: no cell has the attack {name!r}.{_closest(name, attacks)}" for name in unknown]
        figures = (*entry.asr.values(), *entry.c_acc.values())
        problems += [f"{where}: a rate is 0 to 100 percent, got {rate:g}." for rate in figures if not 0 <= rate <= 100]
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """[data.NAME] and its like. ``found``: what each says, as far as it is right and can be looked at further;
    ``broken``: names whose table is not, which stand for nothing; a kind of table itself where it is none."""

    found: dict[str, dict[str, Any]]
    broken: frozenset[tuple[str, str] | str]

    @classmethod
    def read(cls, values: Mapping[str, Any], problems: list[str]) -> Tables:
        defaults, broken = {"attack": "trigger", "method": "method"}, set[tuple[str, str] | str]()
        named = {"attack": {entry.name for entry in ATTACKS}, "method": {entry.name for entry in DEFENSES}}
        found: dict[str, dict[str, Any]] = {key: {} for key in TABLES}
        for key, kind in TABLES.items():
            entries = values.get(key, {})
            if not isinstance(entries, Mapping):
                problems.append(f"{key}: expected tables [{key}.NAME].")
                broken.add(key)
                continue
            for name, entry in entries.items():
                if key in defaults and isinstance(entry, Mapping):
                    entry = {defaults[key]: name, **entry}
                read = read_table(entry, kind, f"[{key}.{name}]")
                problems += read.problems
                if read.problems:
                    broken.add((key, name))
                stands = (
                    not read.problems or key not in defaults or getattr(read.value, defaults[key], "") in named[key]
                )
                if read.value is not None and stands:
                    found[key][name] = read.value
        return cls(found=found, broken=frozenset(broken))

    def is_broken(self, key: str, name: str) -> bool:
        """Whether that has been said of the name's table."""
        return key in self.broken or (key, name) in self.broken


def _one(values: Any, kind: type[T], where: str, problems: list[str]) -> T | None:
    read = read_table(values, kind, where)
    problems += read.problems
    return read.sound


def _closest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def _check_tables(tables: Tables, problems: list[str]) -> None:
    """Triggers, methods and their settings, whatever cells they are used in."""
    for name, attack in tables.found["attack"].items():
        if name == CLEAN:
            problems.append(f"[attack.{CLEAN}]: the clean control has no settings.")
        problems += check_attack(attack, f"[attack.{name}]")
    for name, method in tables.found["method"].items():
        where = f"[method.{name}]"
        if name == GIVEN:
            problems.append(f"{where}: the model as it is given has no settings.")
        wrong = said(partial(find, method.method, DEFENSES), where)
        if not wrong:
            kind = resolve(find(method.method, DEFENSES).config)
            wrong = read_table(method.config, kind, f"{where}: config").problems
        problems += wrong
    for name, model in tables.found["model"].items():
        where = f"[model.{name}]"
        problems += said(partial(check_architecture, model.arch), where)
        problems += read_table(model.victim, ClipVictim, f"{where}: victim").problems
        problems += read_table(model.scores, SeparationConfig, f"{where}: scores").problems


def _cells(entry: Product, tables: Tables, where: str, problems: list[str]) -> list[Cell]:
    """The product's cells, with the victim as given before the first repair of it; what is wrong goes to problems."""
    usable = {}
    for key in ("data", "model", "attack", "method"):
        if not getattr(entry, key):
            problems.append(f"{where}: {key} is empty.")
        usable[key] = {name: _named(key, name, tables, where, problems) for name in getattr(entry, key)}
    problems += [f"{where}: a rate must be in (0, 1], got {rate}." for rate in entry.rate if not 0 < rate <= 1]
    problems += [f"{where}: a seed must be 0 or more, got {seed}." for seed in entry.seed if seed < 0]
    cells = []
    for data, model, attack in product(usable["data"].items(), usable["model"].items(), usable["attack"].items()):
        if data[1] is None or model[1] is None or attack[1] is None:
            continue
        if data[1].train is None and (model[1].kind == "classifier" or data[1].captioned is None):
            problems.append(f"[data.{data[0]}]: {model[0]} has nothing to be trained on; give train.")
        impossible = []
        if attack[0] != CLEAN:
            impossible += impossible_attack(*attack, *model)
            impossible += lacking_captions(attack[0], attack[1][0], *data) if model[1].kind == "clip" else []
            shares = [rate for rate in entry.rate if 0 < rate <= 1]
            impossible += [
                text for rate in shares for text in overfull(attack[0], attack[1][0], rate, data[1], model[1])
            ]
        problems += [f"{where}: {sentence}" for sentence in impossible]
        problems += [f"[data.{data[0]}]: {sentence}" for sentence in wrong_targets(data[1], model[1], attack[1][0])]
        methods = {GIVEN: (None, None)} | {name: pair for name, pair in usable["method"].items() if pair is not None}
        for name, (_, found) in methods.items():
            if found is not None and (lacks := lacking(found, model[1].kind, data[1])):
                hint = f" Give [data.{data[0]}] shots." if lacks == SHOTS else ""
                problems.append(
                    f"{where}: {name} needs {lacks}, which the {kind_of(model[1])} {model[0]} has not.{hint}"
                )
        rates = (0.0,) if attack[0] == CLEAN else entry.rate
        for rate, seed, method in product(rates, entry.seed, methods):
            names = Names(data=data[0], model=model[0], attack=attack[0], rate=rate, method=method, seed=seed)
            cells.append(
                Cell(
                    names=names, data=data[1], model=model[1], attack=attack[1][0], method=methods[method][0],
                    least_asr=LEAST_ASR,
                )
            )  # fmt: skip
    return cells


def _named(key: str, name: str, tables: Tables, where: str, problems: list[str]) -> Any:
    """What a name of the product stands for; None, and a problem, where it stands for nothing.

    Data and models: their settings. Attacks and methods: (settings, catalog's entry), (None, None) for the controls.
    """
    if tables.is_broken(key, name):
        return None
    found = tables.found[key]
    if key in ("data", "model"):
        if name not in found:
            problems.append(f"{where}: there is no [{key}.{name}].{_closest(name, found)}")
        return found.get(name)
    if name == (CLEAN if key == "attack" else GIVEN):
        return None, None
    entries = ATTACKS if key == "attack" else DEFENSES
    settings = found.get(name)
    try:
        if settings is None:
            entry = find(name, entries)
            return (AttackSettings(trigger=name) if key == "attack" else MethodSettings(method=name)), entry
        return settings, find(settings.trigger if key == "attack" else settings.method, entries)
    except UnknownMethodError as error:
        known = [entry.name for entry in entries] + list(found) + [CLEAN if key == "attack" else GIVEN]
        problems.append(f"{where}: {error.message}{_closest(name, known)}")
        return None


def _check_files(cells: Any, problems: list[str]) -> None:
    for cell in cells:
        for key, source in cell.data.sources().items():
            missing = said(lambda source=source: source_content(source), f"[data.{cell.names.data}] {key}")
            if (
                not missing
                and looks_local(source)
                and source_content(source) is None
                and not source.startswith("shapes")
            ):
                missing = [f"[data.{cell.names.data}] {key}: {source} is not there."]
            problems += missing
        for key in ("model", "clip"):
            model = getattr(cell.model, key)
            problems += [f"[model.{cell.names.model}] {key}: {sentence}" for sentence in missing_clip(model)]


def _with_contents(cell: Cell) -> Cell:
    found = {f"data.{key}": source_content(source) for key, source in cell.data.sources().items()}
    found |= {f"model.{key}": path_content(Path(getattr(cell.model, key))) for key in ("model", "clip")}
    if cell.method is not None:
        found[DEFAULTS] = method_defaults(cell.method.method, published=cell.method.published)
    contents = {key: value for key, value in found.items() if value is not None}
    return replace(cell, contents=contents)
