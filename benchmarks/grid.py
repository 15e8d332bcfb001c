"""What grids/cpu.toml found: kept in the repository, as the tables of the docs and as the figures that are claimed.

    unpoison bench run grids/cpu.toml -o runs/bench-cpu       # start it twice for two cores; resumes
    python benchmarks/grid.py keep      # plans, cells, CSV and leaderboard to benchmarks/results/bench-cpu
    python benchmarks/grid.py claims    # benchmarks/results/grid.json
    python benchmarks/grid.py tables    # docs/results.md: one table per question

``bench table benchmarks/results/bench-cpu`` shows what is kept with all its columns.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clean_rates
import numpy as np

from unpoison.benchmark.cell import CellResult, Figures
from unpoison.benchmark.formats import (
    COMPARISON,
    GLANCE,
    SPREAD,
    again,
    as_csv,
    bars,
    cells_of,
    compared,
    failure_lines,
    glance,
    headings,
    short_keys,
)
from unpoison.benchmark.rows import Row, columns_of, processor_seconds
from unpoison.benchmark.settings import CLEAN, GIVEN
from unpoison.benchmark.store import Store
from unpoison.benchmark.table import Table, make_table
from unpoison.evaluation.intervals import wilson
from unpoison.report.leaderboard import render_leaderboard
from unpoison.results import write_atomically

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks/results/bench-cpu"
SUMMARY = ROOT / "benchmarks/results/grid.json"
PAGE = ROOT / "docs/results.md"

PAIR_ATTACKS = ("badnet-rand", "badnet-stripes", "blended-rand", "blended-stripes", "blended-triangles", "blended-text",
                "wanet-strong", "badclip")  # fmt: skip
"""The eight of the CLIP repair's table."""
TOKEN_ATTACKS = ("badnet-rand", "badnet-stripes", "blended-rand", "sig-clip", "wanet-strong", "blended-text", "badclip")
"""The seven of UBT's and CBPT's."""
TEMPLATES = tuple(name for name in TOKEN_ATTACKS if name != "badclip")
SEARCH_SEEDS = (0, 1)
SEEN_CLEAN = (*SEARCH_SEEDS, 6)  # the last had been suspected when the second search was added (decision 5)
"""The search's thresholds were set on victims of these seeds (docs/decisions/0005)."""
LABEL_SEED = 4
"""The label-only victim after which the test for odd labels was changed (decision 3); later seeds are unseen."""
SAMPLE_ATTACKS = ("badnet", "blended", "sig", "wanet", "clean-image")
CLIP_REPAIRS = {"par": "par-paper", "clip_ours": "par", "cleanclip": "clean-clip", "fine-tuning": "fine-tuning"}
"""What a claim calls a method, and what the grid does."""
SAMPLE_METHODS = ("cgd", "pad-ft", "pad-ft-paper", "ft", "ft-sam", "fine-pruning", "nad", "anp", "i-bau", "abl")
Pick = Callable[[CellResult], float | None]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells that have figures, by what the grid calls them."""

    all: tuple[CellResult, ...]
    refused: int
    failed: int
    planned: int

    @classmethod
    def of(cls, folder: Path) -> "Cells":
        store = Store.read(folder)
        planned = [cell for plan in store.plans() for cell in plan.cells]
        found = [result for cell in planned if (result := store.found(cell.key, cell.names)) is not None]
        done = tuple(result for result in found if result.status == "done")
        refused = sum(result.status == "refused" for result in found)
        return cls(all=done, refused=refused, failed=len(found) - len(done) - refused, planned=len(planned))

    def where(self, method: str, attacks: Sequence[str]) -> list[CellResult]:
        return [cell for cell in self.all if cell.names.method == method and cell.names.attack in attacks]

    def figure(self, method: str, attacks: Sequence[str], pick: Pick, *, without: Sequence[int] = ()) -> dict[str, Any]:
        """Mean, extremes and where they stand, over single cells: attack x seed, ``without`` some seeds."""
        known = {f"{c.names.attack}-{c.names.seed}": number for c in self.where(method, attacks)
                 if c.names.seed not in without and (number := pick(c)) is not None}  # fmt: skip
        if not known:
            return {"cells": 0}
        most, least = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
        return {
            "mean": round(float(np.mean([*known.values()])), 4),
            "max": round(known[most], 4), "max_at": most, "min": round(known[least], 4), "min_at": least,
            "cells": len(known), "seeds": len({name.rpartition("-")[2] for name in known}),
        }  # fmt: skip

    def rate(self, method: str, attacks: Sequence[str], pick: Pick, *, without: Sequence[int] = ()) -> dict[str, Any]:
        """The same of what is 0 or 100 in a cell, with its Wilson interval: each victim is one trial."""
        found = self.figure(method, attacks, pick, without=without)
        if not found["cells"]:
            return found
        interval = wilson(round(found["mean"] * found["cells"] / 100), found["cells"])
        return found | {"low": round(interval.low, 4), "high": round(interval.high, 4)}

    def ratio(self, method: str, other: str, attacks: Sequence[str]) -> dict[str, Any]:
        """Processor seconds of one method over those of another on the same victim, over single cells; with one thread
        in each they are what the clock shows on an idle machine."""
        seconds = {(cell.names.attack, cell.names.seed): processor_seconds(cell) for cell in self.where(other, attacks)}

        def pick(cell: CellResult) -> float | None:
            own, beside = processor_seconds(cell), seconds.get((cell.names.attack, cell.names.seed))
            return None if own is None or beside is None else own / beside

        return self.figure(method, attacks, pick)


def excess(cell: CellResult) -> float | None:
    return None if cell.after is None else cell.after.asr_excess


def fall(cell: CellResult) -> float | None:
    """Points of C-Acc that the repair cost."""
    if cell.before is None or cell.after is None:
        return None
    return cell.before.c_acc.value - cell.after.c_acc.value


def detected(name: str) -> Pick:
    return lambda cell: None if cell.repaired is None else cell.repaired.detection.get(name)


def suspected(cell: CellResult) -> float | None:
    """100 where a search suspects any class, 0 where none."""
    found = detected("suspected")(cell)
    return None if found is None else 100.0 * (found > 0)


def rebound(cell: CellResult) -> float | None:
    after: Figures | None = None if cell.repaired is None else cell.repaired.rebound
    return None if after is None else after.asr_excess


def claims(cells: Cells) -> dict[str, Any]:
    """What the issue of each method asks for. ASR is the excess over the natural floor."""
    body: dict[str, Any] = {
        "grid": {
            "done": len(cells.all),
            "refused": cells.refused,
            "failed": cells.failed,
            "planned": cells.planned,
        },
    }
    for name, method in CLIP_REPAIRS.items():
        body[name] = {
            "asr_after": cells.figure(method, PAIR_ATTACKS, excess),
            "c_acc_drop": cells.figure(method, PAIR_ATTACKS, fall),
            "clean_c_acc_drop": cells.figure(method, [CLEAN], fall),
            "rebound": cells.figure(method, PAIR_ATTACKS, rebound),
        }
    for method in ("ubt", "cbpt", "rvpt", "linear-probe", "abl-clip"):
        body[method] = {
            "asr_after": cells.figure(method, TOKEN_ATTACKS, excess),
            "c_acc_drop": cells.figure(method, TOKEN_ATTACKS, fall),
            "clean_c_acc_drop": cells.figure(method, [CLEAN], fall),
        }
    body["ubt"] |= {
        "auroc": cells.figure("ubt", TEMPLATES, detected("auroc")),
        "recall": cells.figure("ubt", TOKEN_ATTACKS, detected("recall")),
        "precision": cells.figure("ubt", TOKEN_ATTACKS, detected("precision")),
        "unlearnt_share": cells.figure("ubt", TOKEN_ATTACKS, detected("unlearnt")),
        "wall_ratio_to_cleanclip": cells.ratio("ubt", "clean-clip", TOKEN_ATTACKS),
    }
    body["cbpt"] |= {
        "target_found": cells.rate("cbpt", TOKEN_ATTACKS, detected("target_found")),
        "target_found_held_out": cells.rate("cbpt", TOKEN_ATTACKS, detected("target_found"), without=SEARCH_SEEDS),
        "target_exact": cells.rate("cbpt", TOKEN_ATTACKS, detected("target_exact")),
        "false_alarm": cells.rate("cbpt", [CLEAN], suspected),
        "false_alarm_held_out": cells.rate("cbpt", [CLEAN], suspected, without=SEEN_CLEAN),
        "wall_ratio_to_rvpt": cells.ratio("cbpt", "rvpt", TOKEN_ATTACKS),
    }
    for method in SAMPLE_METHODS:
        body[method] = {
            "asr_after": cells.figure(method, SAMPLE_ATTACKS, excess),
            "c_acc_drop": cells.figure(method, SAMPLE_ATTACKS, fall),
            "clean_c_acc_drop": cells.figure(method, [CLEAN], fall),
            "target_purity": cells.figure(method, SAMPLE_ATTACKS, detected("target_purity")),
        }
    return body


@dataclass(frozen=True, kw_only=True)
class Question:
    """One table of the page: which rows of the grid, and which of their figures."""

    title: str
    text: str
    kind: str
    attacks: tuple[str, ...]
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    note: Callable[[Cells], str] | None = None


def search_note(cells: Cells) -> str:
    """How often CBPT's search was right, and how often on victims that its thresholds have not seen."""

    def said(name: str, what: str) -> str:
        made = claims(cells)["cbpt"]
        parts = [
            f"of {made[key]['cells']} {seeds} {made[key]['mean']:.0f} percent (95 % interval {made[key]['low']:.0f} to "
            f"{made[key]['high']:.0f})"
            for key, seeds in ((name, "of all seeds"), (f"{name}_held_out", "of other seeds"))
            if made[key]["cells"]
        ]
        return f"{what}: {', '.join(parts) or 'no cell yet'}"

    return (
        f"CBPT's search, whose thresholds were set on victims of seeds {' and '.join(map(str, SEARCH_SEEDS))}; its "
        f"second look was added after the clean model of seed {SEEN_CLEAN[-1]} had been suspected. "
        f"{said('target_found', 'Target among the suspects')}. {said('false_alarm', 'A clean model suspected')}."
    )


def label_note(cells: Cells) -> str:
    """What the repairs leave of label-only attacks that had no part in the test for odd labels."""
    shown = []
    for name in ("cgd", "pad-ft"):
        left = [(cell.names.seed, value) for cell in cells.where(name, ["clean-image"])
                if cell.names.seed > LABEL_SEED and (value := excess(cell)) is not None]  # fmt: skip
        shown.append(f"{name} {', '.join(f'{value:.1f} (seed {seed})' for seed, value in left) or 'not run yet'}")
    return (
        "Where only labels were changed CGD and PAD-FT rest on the test for odd labels, changed after the victim of "
        f"seed {LABEL_SEED} had been seen ([decision 3](decisions/0003-odd-labels.md)). Excess ASR on victims of later "
        f"seeds: {'; '.join(shown)}."
    )


KINDS = {"classifier": "Classifiers", "clip": "CLIP models"}
COSTS = ("c_acc", "asr", "asr_excess", "ra")
QUESTIONS = (
    Question(
        title="Repairing a CLIP with clean pairs",
        text="PAR in this package's default, as its paper has it (`par-paper`), CleanCLIP and plain fine-tuning: 200 "
        "steps of 128 each, on the same pairs. *R@1* is image to text among 1,000 images of Flickr8k; *retrieval ASR*: "
        "how often a caption of the target is among the first five for a triggered image.",
        kind="clip",
        attacks=(*PAIR_ATTACKS, "sig-clip", CLEAN),
        methods=(GIVEN, "fine-tuning", "clean-clip", "par-paper", "par"),
        columns=(*COSTS, "r_at_1", "retrieval_asr", "drift", "rebound", "seconds", "processor"),
    ),
    Question(
        title="Unlearning with the poisoned pairs",
        text="UBT and ABL get the pairs that the victim was trained on, poison included; AUROC, recall and precision "
        "are those of the list of suspicious pairs, *unlearnt* is the share of the pairs that UBT unlearns from or "
        "judges by. PAR and CleanCLIP stand beside them, with the same pairs unpoisoned.",
        kind="clip",
        attacks=(*TOKEN_ATTACKS, CLEAN),
        methods=(GIVEN, "clean-clip", "par", "abl-clip", "ubt"),
        columns=(*COSTS, "r_at_1", "auroc", "recall", "precision", "unlearnt", "rebound", "seconds", "processor"),
    ),
    Question(
        title="Repairing a zero-shot classifier, the weights untouched",
        text="CBPT, RVPT and a linear probe get 16 clean labelled images of each class and some more to judge by. "
        "*Target found*: it is among the classes that the search suspects; *nothing else*: and no other is. CBPT "
        "and the probe leave the CLIP as it was: its retrieval stays as attackable. RVPT moves no weight either, but "
        "its prompts in the image tower give other embeddings, which are measured. `cbpt-paper` runs with seed 0 only, "
        "on two attacks and the control.",
        kind="clip",
        attacks=(*TOKEN_ATTACKS, CLEAN),
        methods=(GIVEN, "cbpt", "cbpt-paper", "rvpt", "linear-probe"),
        columns=(*COSTS, "retrieval_asr", "target_found", "target_exact", "seconds", "processor"),
        note=search_note,
    ),
    Question(
        title="Repairing a classifier with its own poisoned training set",
        text="All of them start from the same scores (CGD's, with the tiny CLIP). *Purity*: the clean share of the "
        "target's samples that are trusted.",
        kind="classifier",
        attacks=(*SAMPLE_ATTACKS, CLEAN),
        methods=(GIVEN, *SAMPLE_METHODS),
        columns=(*COSTS, "der", "purity", "changed", "seconds", "processor"),
        note=label_note,
    ),
    Question(
        title="More attacks on classifiers, the last two adaptive",
        text="`boundary` poisons images that the defender's own CLIP nearly takes for the target (against CGD), "
        "`low-gap` is made so that no sample is learnt early (against PAD-FT and CGD's second axis).",
        kind="classifier",
        attacks=("bpp", "lf", "adap-blend", "boundary", "low-gap"),
        methods=(GIVEN, *SAMPLE_METHODS),
        columns=(*COSTS, "der", "purity", "processor"),
    ),
    Question(
        title="Attackers of CLIPs who know the defense, and two backdoors at once",
        text="`aligned` uses real captions that fit the image (against UBT), `through-par` trains its patch "
        "through PAR, `feature-small` is fitted to stay under CBPT's inversion, `two-targets` plants two backdoors, "
        "and its target counts as found where both are. One victim each, of seed 0: how far others differ is open.",
        kind="clip",
        attacks=("aligned", "through-par", "feature-small", "two-targets"),
        methods=(GIVEN, "par", "ubt", "cbpt", "clean-clip"),
        columns=(*COSTS, "auroc", "target_found", "rebound", "processor"),
    ),
)


def question_table(question: Question, rows: Sequence[Row]) -> list[str]:
    """By attack, then method, in the question's order."""
    chosen = sorted(
        (
            row
            for row in rows
            if row.kind == question.kind and row.attack in question.attacks and row.method in question.methods
        ),
        key=lambda row: (question.attacks.index(row.attack), question.methods.index(row.method)),
    )
    if not chosen:
        return ["Not run yet."]
    columns = [column for column in columns_of(chosen) if column.name in question.columns]
    return bars([*headings(columns), "cells"], ([*cells_of(row, columns), " ".join(short_keys(row))] for row in chosen))


def page(table: Table, cells: Cells) -> str:
    done = table.cells - table.missing - len(table.failures)
    lines = [
        "# Results",
        "",
        "`grids/cpu.toml` on two cores: 10,000 rows of CIFAR-10 with a small ResNet, and the tiny CLIP fine-tuned on",
        "poisoned CIFAR-10 and Flickr8k. `python benchmarks/grid.py tables` writes this page from the kept cells in",
        "[`benchmarks/results/bench-cpu`](../benchmarks/results/bench-cpu): all columns, settings and the command",
        "of each cell stand there too; [the leaderboard](../benchmarks/results/bench-cpu/leaderboard.html) draws them.",
        "",
        f"{done} of {table.cells} cells are done, {cells.refused} were refused (the victim's ASR is under 90 percent:",
        f"there is nothing to repair), {cells.failed} failed, {table.missing} have not run.",
        "",
        SPREAD,
        "",
        "Small models on small images: they tell methods apart, and are no forecast for a large CLIP. *CPU s* are",
        "processor seconds of the method itself with the scores it needed, on one thread: what an idle core takes;",
        "*seconds* are by the clock, on two cores that other runs shared.",
        "",
        *(line for text in again(table.rows) for line in (text, "")),
        "## Methods at a glance",
        "",
    ]
    for summary in table.summaries:
        lines += [f"### {KINDS[summary.kind]}", "", summary.over, ""]
        if summary.methods:
            lines += [*bars(GLANCE, map(glance, summary.methods)), ""]
    for question in QUESTIONS:
        lines += [f"## {question.title}", "", question.text, "", *question_table(question, table.rows), ""]
        lines += [question.note(cells), ""] if question.note is not None else []
    lines += ["## What clean models say to the same triggers", "", clean_rates.NOTE, "", *clean_rates.table(), ""]
    if table.reported:
        lines += ["## What papers report", "", *bars(COMPARISON, map(compared, table.reported)), ""]
    if table.failures:
        lines += ["## Cells without figures", "", *(f"- {line}" for line in failure_lines(table.failures)), ""]
    return "\n".join(lines)


def keep(runs: Path) -> None:
    """Copy what is finished of the grid as it is now; cells of earlier settings go. Nothing shared or half done."""
    source = Store.read(runs)
    planned = {f"{cell.key}.json" for plan in source.plans() for cell in plan.cells}
    for name in ("plans", "cells"):
        (KEPT / name).mkdir(parents=True, exist_ok=True)
        for file in sorted((source.path / name).glob("*.json")):
            if name == "plans" or file.name in planned:
                shutil.copyfile(file, KEPT / name / file.name)
    for file in (KEPT / "cells").glob("*.json"):
        if file.name not in planned or not (source.path / "cells" / file.name).exists():
            file.unlink()
    shutil.copyfile(source.path / "bench.json", KEPT / "bench.json")
    table = make_table(Store.read(KEPT))
    write_atomically(KEPT / "table.csv", as_csv(table).encode())
    write_atomically(KEPT / "leaderboard.html", render_leaderboard(table).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("keep", "claims", "tables"))
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-cpu"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is not up to date")
    args = parser.parse_args()
    if args.command == "keep":
        keep(args.runs)
        return 0
    if args.command == "claims":
        file, text = SUMMARY, json.dumps(claims(Cells.of(KEPT)), indent=1) + "\n"
    else:
        file, text = PAGE, page(make_table(Store.read(KEPT)), Cells.of(KEPT))
    if args.check:
        current = file.is_file() and file.read_text() == text
        print(f"{file.relative_to(ROOT)} is {'' if current else 'not '}what the kept cells say")
        return int(not current)
    write_atomically(file, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
