"""PAD-FT and the clean-data defenses on CIFAR-10: attack x seed x method, one JSON a cell.

    python benchmarks/pad_ft.py run [--attack badnet ...] [--seed 0 ...] [--method pad-ft ...]
    python benchmarks/pad_ft.py run --set tune --seed 9 --method pad-ft learned ...   # variants, on other victims
    python benchmarks/pad_ft.py run --attack published    # the published WRN-16-1 with its own trigger
    python benchmarks/pad_ft.py table
    python benchmarks/pad_ft.py plot      # the ablation's variants, as --set tune measured them

Victims, scores and splits are those of benchmarks/cgd.py: rows 25,000..34,999 of CIFAR-10 train, 5 percent poisoned
toward class 0. All 10,000 test images for every rate; ``--set tune`` measures rows 45,000.. of train instead, which
nothing else uses. One thread a process; a cell that is done with the same settings is not computed again, and one whose
settings are not on record counts as stale. The table marks methods with * where a repair was not accepted: what stands
there is the model that was refused.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cgd import Cell, rates
from pad_ft_variants import CGD_VARIANTS, CLASSIC_NAMES, CLASSIC_VARIANTS, PAD_FT, SIZES, VARIANTS

from unpoison.api_repairs import CLASSICS
from unpoison.data.sources import open_images
from unpoison.defenses.cgd import CGDConfig, repair_with_cgd
from unpoison.defenses.pad_ft import PADFTConfig, repair_with_pad_ft
from unpoison.defenses.repair import Repair
from unpoison.detection.cgd import apply_classifier, with_mean_rank
from unpoison.detection.self_purified import score_by_own_loss, select_clean, with_suspects
from unpoison.detection.thresholds import split_by_evidence
from unpoison.evaluation.classifier import evaluate_before_after
from unpoison.models.classifier import load_classifier
from unpoison.models.image_classifier import ImageClassifier
from unpoison.results import Evaluation, SampleScores, Split, write_atomically
from unpoison.runs import Run, RunFolder

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/pad_ft"
SUMMARY = ROOT / "benchmarks/results/pad_ft.json"
PLOT = ROOT / "docs/pad_ft_ablation.svg"
PUBLISHED = "published"
ATTACKS = ("badnet", "blended", "sig", "wanet", "clean-image", "clean", PUBLISHED)
TUNE = "cifar10/train.parquet[45000:50000]"


ABLATED = (("badnet", 9), ("blended", 9))
PANELS = {
    "bounds": {"none": "clip-none", "quantile": "clip-quantile", "learned": "clip-learned", "margin": "clip-margin",
               "suspects": "pad-ft"},
    "head": {"tuned": "pad-ft", "drawn anew": "reset-head", "no unlearning": "no-unlearning"},
    "choice of samples": {"own losses": "own-rule", "half": "share-0.5", "CGD's ranks": "pad-ft"},
}  # fmt: skip


@dataclass(kw_only=True)
class Setting:
    """A victim, its training set, and what stage A says of it: everything below is computed once."""

    cell: Cell
    run: Run
    attack: str
    shared: Path

    @classmethod
    def of(cls, attack: str, seed: int, args: argparse.Namespace) -> "Setting":
        cell = Cell("badnet" if attack == PUBLISHED else attack, seed, args.shared, args.work)
        if args.set == "tune":
            cell.test = open_images(f"{args.shared}/data/{TUNE}")
        return cls(cell=cell, run=replace(cell.run, folder=None), attack=attack, shared=args.shared)

    def victim(self) -> ImageClassifier:
        """The published one was trained by others, on rows that we do not know, with our BadNet's trigger."""
        if self.attack != PUBLISHED:
            return self.cell.victim()
        return load_classifier(
            self.shared / "models/wrn16_1_cifar10_grid_target0.pth", arch="wrn-16-1",
            class_names=self.cell.source.class_names, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
        )  # fmt: skip

    @cached_property
    def before(self) -> Evaluation:
        return self.cell.evaluate(self.victim())

    def own_scores(self, victim) -> SampleScores:
        source = self.cell.source
        rows = np.flatnonzero(self.cell.pixels.usable)
        logits = np.full((len(source), len(source.class_names)), np.nan)
        logits[rows] = apply_classifier(victim, self.cell.pixels, rows, run=self.run)
        return score_by_own_loss(logits, source.labels, list(source.ids), source.class_names)

    def purity(self, split: Split) -> dict[str, float]:
        target = split.clean[split.labels[split.clean] == 0]
        poisoned = self.cell.truth
        return {
            "target": 100 * float((~poisoned[target]).mean()),
            "all": 100 * float((~poisoned[split.clean]).mean()),
            "samples": len(split.clean),
        }


def pad_ft(setting: Setting, victim, config: PADFTConfig, run: Run) -> tuple[Repair, Split]:
    own = setting.own_scores(victim)
    if config.scores_share == 0:
        split = select_clean(own, config.per_class, largest_share=config.largest_share)
    else:
        _, scores = setting.cell.scores(CGDConfig().separation)
        split = select_clean(
            own, config.per_class, other=with_mean_rank(scores), share=config.scores_share,
            largest_share=config.largest_share,
        )  # fmt: skip
        split = with_suspects(split, split_by_evidence(scores, odd=config.odd_labels).suspect)
    return repair_with_pad_ft(victim, setting.cell.pixels, split, config, run=run), split


def cgd(setting: Setting, victim, config: CGDConfig, run: Run) -> tuple[Repair | None, Split]:
    zero_shot, scores = setting.cell.scores(config.separation)
    split = split_by_evidence(scores, odd=config.odd_labels)
    if len(split.suspect) == 0:
        return None, split
    return repair_with_cgd(victim, setting.cell.pixels, split, zero_shot.cosines, config, run=run), split


def classic(setting: Setting, victim, name: str, config: Any, run: Run) -> tuple[Repair, Split]:
    _, scores = setting.cell.scores(CGDConfig().separation)
    split = split_by_evidence(scores, odd=getattr(config, "odd_labels", "leave-out"))
    repair_with, _ = CLASSICS[name]
    return repair_with(victim, setting.cell.pixels, split, config, run=run), split


@dataclass(frozen=True, kw_only=True)
class Method:
    """A repair with its settings: ``repair(setting, victim, config, run)``."""

    repair: Callable[..., tuple[Repair | None, Split]]
    config: Any

    def accepts(self, repair: Repair | None) -> bool:
        """As the package's own verbs judge it; a model that is handed back as it is, is accepted."""
        if repair is None:
            return True
        kept = next(look for look in repair.history if look["step"] == repair.steps)
        unlearnt = kept.get("suspect_agreement", 0.0) <= getattr(self.config, "believed", 100.0)
        return repair.held_out_before - repair.held_out_after <= self.config.bound and unlearnt


def of_classic(kind: str, **more: Any) -> Method:
    config = CLASSICS[kind][1](**more)
    return Method(
        repair=lambda setting, victim, config, run: classic(setting, victim, kind, config, run), config=config
    )


METHODS: dict[str, Method] = {
    **{name: Method(repair=pad_ft, config=config) for name, config in (PAD_FT | VARIANTS).items()},
    **{name: of_classic(name) for name in CLASSIC_NAMES},
    **{name: of_classic(kind, **more) for name, (kind, more) in CLASSIC_VARIANTS.items()},
    **{name: Method(repair=cgd, config=config) for name, config in {"cgd": CGDConfig(), **CGD_VARIANTS}.items()},
}


def compute(setting: Setting, method: str) -> dict[str, Any]:
    cell, asked = setting.cell, METHODS[method]
    victim = setting.victim()
    before = setting.before
    folder = RunFolder.open(
        cell.folder.path / f"{setting.attack}-pad-ft-{method}-{key_of(asked.config)}", {"method": method}
    )
    run = replace(cell.run, folder=folder)
    begun, processor = time.time(), time.process_time()
    repair, split = asked.repair(setting, victim, asked.config, run)
    seconds, processor = time.time() - begun, time.process_time() - processor
    after = cell.evaluate(repair.classifier) if repair else before
    return {
        "attack": setting.attack, "seed": cell.run.seed, "method": method, "config": plain(asked.config),
        "test": cell.test.name.removeprefix(f"{setting.shared}/"),
        "repaired": repair is not None, "accepted": asked.accepts(repair),
        "before": rates(before), "after": rates(after),
        "der": evaluate_before_after(before, after), "purity": setting.purity(split),
        "changed_share": repair.changed_share if repair else 0.0, "history": repair.history if repair else [],
        "seconds": seconds, "processor_seconds": processor,
    }  # fmt: skip


def plain(config: Any) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(config)))


def key_of(config: Any) -> str:
    """Tells the folders of other settings apart: none goes on with another's steps."""
    return hashlib.blake2b(json.dumps(plain(config), sort_keys=True).encode(), digest_size=4).hexdigest()


def is_done(file: Path, config: Any) -> bool:
    """Whether a cell was computed with these settings."""
    return file.exists() and json.loads(file.read_bytes()).get("config") == plain(config)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.results.mkdir(parents=True, exist_ok=True)
    for attack in args.attack:
        for seed in args.seed:
            setting = None
            for method in args.method:
                file = args.results / f"{args.set}-{attack}-{seed}-{method}.json"
                if is_done(file, METHODS[method].config):
                    continue
                setting = setting or Setting.of(attack, seed, args)
                result = compute(setting, method)
                write_atomically(file, json.dumps(result, indent=1, default=float).encode() + b"\n")
                print(describe(result), flush=True)


def table(args: argparse.Namespace) -> None:
    """Mean and spread over seeds as Markdown; the figures that are claimed as JSON."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(args.results.glob(f"{args.set}-*.json")):
        result = json.loads(file.read_bytes())
        rows.setdefault((result["attack"], result["method"]), []).append(result)
    names = ("C-Acc", "ASR", "floor", "excess", "RA", "DER", "purity", "changed", "seconds", "processor s")
    print("| attack | method | seeds | " + " | ".join(names) + " |")
    print("|" + "---|" * (3 + len(names)))
    found: dict[str, dict[str, Any]] = {}
    for attack in args.attack:
        victims = [result for (name, _), results in rows.items() if name == attack for result in results]
        if victims:
            print(f"| {attack} | before | | {spread([column(row['before'], row) for row in victims])} |")
        for method in args.method:
            results = rows.get((attack, method), [])
            if results:
                columns = [column(result["after"], result) for result in results]
                refused = sum(not result.get("accepted", True) for result in results)
                mark = "" if not refused else "*" if len(results) == 1 else f"* ({refused} of {len(results)})"
                stale = sum(result.get("config") != plain(METHODS[method].config) for result in results)
                mark += f" [{stale} stale]" if stale else ""
                print(f"| {attack} | {method}{mark} | {len(results)} | {spread(columns)} |")
                found.setdefault(method, {})[attack] = {
                    "seeds": sorted(result["seed"] for result in results),
                    **{name: mean_of(values) for name, values in zip(names, zip(*columns, strict=True), strict=True)},
                    "C-Acc fall": float(np.mean([fall(result) for result in results])),
                    "not accepted": refused,
                }
    if args.set == "test":
        worst = {method: worst_of([row for (_, name), results in rows.items() if name == method for row in results])
                 for method in found}  # fmt: skip
        write_atomically(SUMMARY, json.dumps({"attacks": found, "worst": worst}, indent=1).encode() + b"\n")


def worst_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst single cell of each figure, over attacks and seeds; the published victim and the control apart."""
    own = [row for row in results if row["attack"] not in (PUBLISHED, "clean")]
    there = [row for row in results if row["attack"] == PUBLISHED]
    clean = [row for row in results if row["attack"] == "clean"]
    made: dict[str, Any] = {"cells": len(own)}
    if own:
        made["asr_excess_max"] = max(row["after"]["asr_excess"] for row in own)
        made["c_acc_fall_max"] = max(map(fall, own))
        made["target_purity_min"] = min(row["purity"]["target"] for row in own)
        made["changed_share_max"] = 100 * max(row["changed_share"] for row in own)
    if clean:
        made["clean_c_acc_fall_max"] = max(map(fall, clean))
    if there:
        made["published"] = {
            "asr_excess_max": max(row["after"]["asr_excess"] for row in there),
            "c_acc_fall_max": max(map(fall, there)),
            "target_purity_min": min(row["purity"]["target"] for row in there),
        }
    return made


def plot(args: argparse.Namespace) -> None:
    """C-Acc and excess ASR of the ablation's variants, mean over ABLATED, as docs/pad_ft_ablation.svg."""
    from matplotlib.figure import Figure

    cells: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(args.results.glob("tune-*.json")):
        result = json.loads(file.read_bytes())
        if (result["attack"], result["seed"]) in ABLATED:
            cells.setdefault(result["method"], []).append(result)
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(2, 1 + len(PANELS), sharey="row")
    sizes = [size for size in SIZES if f"n-{size}" in cells]
    for row, key in enumerate(("C-Acc", "excess ASR")):
        panels[row, 0].plot(sizes, [_mean(cells[f"n-{size}"], key) for size in sizes], marker="o")
        panels[row, 0].set(xscale="log", xlabel="samples of each class", ylabel=f"{key}, %")
        for place, (title, names) in enumerate(PANELS.items(), start=1):
            known = {label: _mean(cells[name], key) for label, name in names.items() if name in cells}
            panels[row, place].plot(list(known), list(known.values()), "o")
            for label, value in known.items():
                panels[row, place].annotate(
                    f"{value:.1f}", (label, value), (0, 6), textcoords="offset points", ha="center"
                )
            panels[row, place].margins(x=0.2)
            panels[row, place].tick_params(axis="x", rotation=20)
            panels[0, place].set_title(title)
        panels[row, 0].margins(y=0.2)
    panels[0, 0].set_title("size of the purified set")
    figure.savefig(PLOT, metadata={"Date": None})
    print(PLOT)


def _mean(results: list[dict[str, Any]], key: str) -> float:
    """Over attacks and seeds, in percent."""
    sides = [result["after"] for result in results]
    return float(np.mean([side["c_acc"]["value"] if key == "C-Acc" else side["asr_excess"] for side in sides]))


def column(side: dict[str, Any], result: dict[str, Any]) -> list[float]:
    """One row of the table; NaN for what was not measured."""
    rates_of = [side[key]["value"] if side[key] else np.nan for key in ("c_acc", "asr", "asr_floor")]
    after = side is result["after"]
    more = [result["der"], result["purity"]["target"], 100 * result["changed_share"], result["seconds"],
            result.get("processor_seconds")]  # fmt: skip
    return [
        *rates_of,
        side["asr_excess"] if side["asr_excess"] is not None else np.nan,
        side["ra"]["value"] if side["ra"] else np.nan,
        *([np.nan if value is None else value for value in more] if after else [np.nan] * len(more)),
    ]


def mean_of(values: Sequence[float]) -> float | None:
    """Over what was measured; None where nothing was."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def fall(result: dict[str, Any]) -> float:
    return result["before"]["c_acc"]["value"] - result["after"]["c_acc"]["value"]


def spread(columns: list[list[float]]) -> str:
    values = np.array(columns, dtype=float)
    shown = []
    for entries in values.T:
        known = entries[~np.isnan(entries)]
        if len(known) == 0:
            shown.append("")
        else:
            shown.append(f"{known.mean():.1f}" + (f" ± {known.std(ddof=1):.1f}" if len(known) > 1 else ""))
    return " | ".join(shown)


def describe(result: dict[str, Any]) -> str:
    sides = []
    for name in ("before", "after"):
        found = result[name]
        sides.append(
            " ".join(f"{found[key]['value']:.1f}" for key in ("c_acc", "asr", "asr_floor", "ra") if found[key])
        )
    purity = result["purity"]
    return (f"{result['attack']}-{result['seed']} {result['method']}: {sides[0]} > {sides[1]}  "
            f"purity {purity['target']:.1f} of {purity['samples']}  {result['seconds']:.0f} s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "table", "plot"])
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=[*PAD_FT, *CLASSIC_NAMES, "cgd"])
    parser.add_argument("--set", choices=["test", "tune"], default="test", help="what is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-cgd")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    {"run": run, "table": table, "plot": plot}[args.verb](args)


if __name__ == "__main__":
    main()
