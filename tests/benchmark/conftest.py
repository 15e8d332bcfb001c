"""Grids and results without any training: what a cell comes to is made up here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unpoison.benchmark.cell import Cell, CellResult, Cost, Figures, Repaired
from unpoison.benchmark.grid import Grid, make_grid
from unpoison.benchmark.outcomes import done
from unpoison.evaluation.intervals import wilson

TINY: dict[str, Any] = {
    "description": "A made-up grid.",
    "data": {"shapes": {"train": "shapes:200:0", "test": "shapes:100:1", "target": "star"}},
    "model": {"net": {"kind": "classifier", "epochs": 1}, "tiny": {"kind": "clip", "victim": {"steps": 4}}},
    "cells": [
        {
            "data": ["shapes"], "model": ["net"], "attack": ["clean", "badnet"], "rate": [0.1],
            "method": ["ft", "cgd"], "seed": [0, 1],
        }
    ],
    "reported": [
        {
            "method": "ft", "setting": "a large net", "source": "Doe | 2024", "asr": {"badnet": 7.5},
            "c_acc": {"clean": 93.0},
        }
    ],
}  # fmt: skip


@pytest.fixture
def tables() -> dict[str, Any]:
    """The tables of a grid of one block; free to change."""
    return copy.deepcopy(TINY)


@pytest.fixture
def grid(tables: dict[str, Any]) -> Grid:
    return make_grid(tables, name="tiny", path="tiny.toml")


@pytest.fixture
def made_up() -> Callable[[Cell, Path], CellResult]:
    """Figures that follow from the cell's names alone."""

    def execute(cell: Cell, folder: Path) -> CellResult:
        seed, attacked = cell.names.seed, cell.attack is not None
        before = rates(900 - seed, 950 if attacked else None)
        if cell.method is None:
            return done(cell, before=before, after=before, cost=Cost(seconds=5.0, wall=6.0))
        after = rates(890 - seed, 20 + 10 * seed if attacked else None)
        repaired = Repaired(
            accepted=True, reason="", protects="weights", changed_share=50.0, left_alone=False,
            der=95.0 if attacked else None, config={},
        )  # fmt: skip
        return done(cell, before=before, after=after, repaired=repaired, cost=Cost(seconds=2.0 + seed, wall=4.0))

    return execute


def rates(right: int, attacked: int | None) -> Figures:
    """Of 1,000 clean and 1,000 attacked images."""
    clean = wilson(right, 1000)
    if attacked is None:
        return Figures(c_acc=clean)
    asr, floor = wilson(attacked, 1000), wilson(10, 1000)
    excess = max(0.0, asr.value - floor.value)
    return replace(Figures(c_acc=clean), asr=asr, asr_floor=floor, asr_excess=excess, ra=wilson(1000 - attacked, 1000))
