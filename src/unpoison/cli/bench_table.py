"""``unpoison bench table`` in a terminal: methods at a glance, then the rows, in the columns that there is room for.

No number is broken: where the terminal is narrow, intervals and then columns are left out, and a line says which. What
does not go to a terminal has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.table import Table as Drawn

from unpoison.benchmark.formats import (
    COMPARED,
    COMPARISON,
    GLANCE,
    SPREAD,
    again,
    cells_of,
    compared,
    failure_lines,
    glance,
    headings,
    sections,
    short_keys,
)
from unpoison.benchmark.rows import Row, columns_of
from unpoison.cli.console import printable

if TYPE_CHECKING:
    from rich.console import Console

    from unpoison.benchmark.table import Table

SHOWN = ("c_acc_before", "c_acc", "asr_before", "asr", "asr_floor", "asr_excess", "ra", "rebound", "seconds")
_UNLIMITED = 100_000
_GAP = 2
_WORDS = 28  # columns that texts get at least, where they are so long
_ROWS = ("cells", "n", "floor", "rebound", "seeds", "C-Acc before", "ASR before", "seconds", "RA")
_GLANCE = ("CPU s", "worst fall", "fall, clean model", "RA", "worst adaptive", "fall of C-Acc", "adaptive")
_PAPERS = ("source", "the paper's setting", "C-Acc, paper", "C-Acc, ours")
"""What goes first where a terminal is narrow."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One column. ``words``: it may go on in the next line, as no number may."""

    title: str
    texts: list[str]
    words: bool = False
    right: bool = True

    @property
    def widest(self) -> int:
        """What no line of it is wider than; the heading may go on after each word."""
        lines = [line for text in self.texts for line in text.split("\n")]
        return max(map(cell_len, (*lines, *self.title.split())))

    @property
    def least(self) -> int:
        """What it needs for no number, and no word, to be broken."""
        if not self.words:
            return self.widest
        return max(min(self.widest, _WORDS), *map(cell_len, " ".join((self.title, *self.texts)).split()))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How tables are drawn: where intervals stand, and the columns that are ``dropped``, by their titles."""

    intervals: Literal["beside", "below", "none"]
    dropped: tuple[str, ...] = ()

    def figure(self, text: str) -> str:
        """``95.0 (91.0 to 97.3)`` as it is, on two lines with the interval without what makes it wide, or alone."""
        value, bracket, interval = text.partition(" (")
        if not bracket or self.intervals == "beside":
            return text
        return f"{value}\n{interval.rstrip(')').replace(' to ', '..')}" if self.intervals == "below" else value


Make = Callable[[Layout], list[list[Part]]]
"""All columns of some tables."""


def layouts(order: Sequence[str]) -> Iterator[Layout]:
    """From everything in one line to what cannot be done without; ``order``: what goes first."""
    yield Layout(intervals="beside")
    yield Layout(intervals="below")
    yield from (Layout(intervals="none", dropped=tuple(order[:count])) for count in range(len(order) + 1))


def fitting(make: Make, order: Sequence[str], width: int) -> tuple[list[list[Part]], list[str]]:
    """The tables in the first layout that fits ``width`` columns, the last where none does, and what is not in them."""
    tables, layout = make(Layout(intervals="beside")), Layout(intervals="beside")
    whole = tables
    for layout in layouts(order):
        tables = [[part for part in parts if part.title not in layout.dropped] for parts in make(layout)]
        if all(room(parts, width) >= 0 for parts in tables):
            break
    there = {part.title: part for parts in whole for part in parts}
    spread = any(" (" in text for part in there.values() if part.right for text in part.texts)
    said = ["intervals"] if spread and layout.intervals == "none" else []
    return tables, [*said, *(title for title in layout.dropped if title in there)]


def room(parts: Sequence[Part], width: int) -> int:
    """How many columns are left over."""
    return width - sum(part.least for part in parts) - _GAP * (len(parts) - 1)


def draw(parts: Sequence[Part], width: int) -> Drawn:
    """A table without lines. Each column has the width that it needs, those of words more where there is room; names
    give way where even the least is too much."""
    drawn, left = Drawn(box=None, pad_edge=False, padding=(0, _GAP, 0, 0)), room(parts, width)
    for part in parts:
        more = max(0, min(left, part.widest - part.least))
        left -= more
        fixed = part.least + more if part.right or left >= 0 else None
        drawn.add_column(part.title, justify="right" if part.right else "left", width=fixed, overflow="fold")
    for row in zip(*(part.texts for part in parts), strict=True):
        drawn.add_row(*row)
    return drawn


def show_table(out: Console, made: Table) -> None:
    """All of a benchmark's table."""
    if not out.is_terminal:
        out.width = _UNLIMITED
    left_out = _show_glance(out, made)
    drawn = list(sections(made))
    tables, more = fitting(lambda layout: [row_parts(rows, layout) for _, rows in drawn], _ROWS, out.width)
    for (heading, _), parts in zip(drawn, tables, strict=True):
        out.print(printable(heading))
        out.print(draw(parts, out.width))
        out.print()
    if made.rows:
        out.print(SPREAD)
        for line in again(made.rows):
            out.print(printable(line), soft_wrap=True)
    left_out += [entry for entry in more if entry not in left_out]
    left_out += [entry for entry in _show_papers(out, made) if entry not in left_out]
    if left_out:
        out.print()
        out.print(
            f"Not shown at {out.width} columns: {'; '.join(left_out)}. A wider terminal, a pipe or --format has them."
        )
    if any(row.refused for row in made.rows):
        out.print("* not accepted by the method itself in one seed or more")
    for line in failure_lines(made.failures):
        out.print(printable(line), soft_wrap=True)
    if made.missing:
        out.print(f"{made.missing} of {made.cells} cells have not run.")
    for note in made.notes:
        out.print(printable(note))


def row_parts(rows: Sequence[Row], layout: Layout) -> list[Part]:
    """The columns of one data set and model, with the cells by their hashes."""
    chosen = [column for column in columns_of(rows) if column.name in SHOWN]
    drawn = columns(headings(chosen), [cells_of(row, chosen) for row in rows], layout, left=("attack", "method"))
    keys = [("\n" if layout.intervals == "below" else " ").join(short_keys(row)) for row in rows]
    return [*drawn, Part(title="cells", texts=keys, right=False)]


def columns(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    layout: Layout,
    *,
    left: Sequence[str],
    words: Sequence[str] = (),
) -> list[Part]:
    """Columns of rows of texts; those ``left`` hold no figures, those of ``words`` may go on in the next line."""
    parts = []
    for at, title in enumerate(titles):
        texts = [printable(row[at]) if title in left else layout.figure(printable(row[at])) for row in rows]
        parts.append(Part(title=title, texts=texts, words=title in words, right=title not in left))
    return parts


def _show_glance(out: Console, made: Table) -> list[str]:
    """The methods of each kind of model; what there was no room for."""
    entries = [[glance(entry) for entry in summary.methods] for summary in made.summaries]
    rows = [row for found in entries for row in found]
    empty = [title for at, title in enumerate(GLANCE) if not any(row[at] for row in rows)]
    order = [*empty, *(title for title in _GLANCE if title not in empty)]
    tables, left_out = fitting(
        lambda layout: [columns(GLANCE, found, layout, left=GLANCE[:1]) for found in entries], order, out.width
    )
    for summary, parts in zip(made.summaries, tables, strict=True):
        out.print(printable(f"Methods at a glance, {summary.kind}. {summary.over}"))
        if summary.methods:
            out.print(draw(parts, out.width))
        out.print()
    return [title for title in left_out if title not in empty]


def _show_papers(out: Console, made: Table) -> list[str]:
    """Figures of papers beside ours; what there was no room for."""
    if not made.reported:
        return []
    rows, text = [compared(entry) for entry in made.reported], ("attack", "method", *COMPARISON[6:])
    (parts,), left_out = fitting(
        lambda layout: [columns(COMPARISON, rows, layout, left=text, words=("attack", *text[2:]))], _PAPERS, out.width
    )
    out.print()
    out.print(draw(parts, out.width))
    out.print(COMPARED)
    return left_out
