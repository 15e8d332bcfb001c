"""The benchmark's table in a terminal: glance first, no number broken at any width, what is left out is said."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from unpoison.benchmark.rows import Row, Value
from unpoison.benchmark.summary import MethodSummary, Summary
from unpoison.benchmark.table import Comparison, Table
from unpoison.cli.bench_table import show_table

METHODS = ("none", "pad-ft-paper", "linear-probe")
FIGURES = {"c_acc_before": 75.5, "c_acc": 74.25, "asr_before": 99.4, "asr": 12.3, "asr_floor": 3.8, "asr_excess": 8.5,
           "ra": 45.6, "rebound": 17.2, "seconds": 1016.3}  # fmt: skip


def row(attack: str, method: str) -> Row:
    values = {name: Value(mean=mean, std=1.0, low=mean - 2, high=mean + 2, seeds=3) for name, mean in FIGURES.items()}
    return Row(
        data="cifar10", model="small-resnet", kind="classifier", attack=attack, rate=0.05, method=method,
        seeds=(0, 1, 2), values=values, n=10_000, attacked=9_000, refused=0, left_alone=0,
        keys=("0387dc99" * 2, "4d687e1f" * 2, "3c80b59a" * 2), command="unpoison bench run g.toml --cell 0387dc99 -o o",
    )  # fmt: skip


@pytest.fixture
def table() -> Table:
    rows = tuple(row(attack, method) for attack in ("badnet", "blended-triangles") for method in METHODS)
    methods = tuple(
        MethodSummary(method=method, excess=94.5, worst_excess=97.1, fall=-0.4, worst_fall=22.0, ra=50.8,
                      control_fall=1.1, adaptive=None, worst_adaptive=None, processor=317.0)
        for method in METHODS
    )  # fmt: skip
    reported = Comparison(
        attack="badnet", method="pad-ft-paper", asr=0.12, c_acc=91.34, our_asr=rows[0].values["asr"],
        our_c_acc=rows[0].values["c_acc"], setting="PreAct-ResNet-18, all of CIFAR-10, 5 percent poisoned",
        source="Doe et al., arXiv 2501.00001, table 3",
    )  # fmt: skip
    return Table(
        title="g", rows=rows, failures=(), missing=0, cells=18, notes=(), reported=(reported,),
        summaries=(Summary(kind="classifier", methods=methods, over="Means over 2 attacks.", rows=rows),),
    )  # fmt: skip


def drawn(table: Table, width: int, *, terminal: bool = True) -> str:
    out = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, markup=False, highlight=False
    )  # fmt: skip
    show_table(out, table)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def numbers(text: str) -> set[str]:
    return set(re.findall(r"-?\d[\d,]*(?:\.\d+)?", text))


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120, 132, 160, 200, 240, 400])
def test_no_number_is_broken_and_what_is_left_out_is_said(table: Table, width: int) -> None:
    text = drawn(table, width)
    whole = drawn(table, 80, terminal=False)
    said = f"Not shown at {width} columns: " in text
    assert said == (numbers(text) - {str(width)} != numbers(whole))
    assert numbers(text) - numbers(whole) <= {str(width)}
    assert all(len(line) <= width for line in text.splitlines() if "bench run" not in line)
    for line in ("pad-ft-paper", "blended-triangles 5 %", "linear-probe"):
        assert line in text  # nor a name
    assert "8.5" in text  # the excess ASR stays to the last
    assert text.index("at a glance") < text.index("cifar10, small-resnet")


def test_intervals_go_first_and_columns_one_by_one(table: Table) -> None:
    assert "12.3 (10.3 to 14.3)" in drawn(table, 300)
    stacked = drawn(table, 200)
    assert "10.3..14.3" in stacked
    assert "Not shown" not in stacked
    narrow = drawn(table, 120)
    assert "10.3" not in narrow.partition("Rates in percent")[0]
    (said,) = re.findall(r"Not shown at 120 columns: ([^.]*)\.", narrow)
    assert said.split("; ")[:2] == ["intervals", "cells"]
    assert "seconds" not in said
    few = " ".join(drawn(table, 60).split())
    assert re.search(r"Not shown at 60 columns: intervals; cells; n; floor; rebound; seeds; C-Acc before", few)


def test_a_pipe_gets_all_of_it_in_one_line_a_row(table: Table) -> None:
    text = drawn(table, 80, terminal=False)
    (line,) = (line for line in text.splitlines() if line.startswith("blended-triangles 5 %  linear-probe"))
    for shown in ("10,000 / 9,000", "12.3 (10.3 to 14.3)", "1016.3", "0387dc99 4d687e1f 3c80b59a"):
        assert shown in line
    assert "Not shown" not in text
