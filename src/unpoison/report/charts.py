"""The charts of a report: SVG to stand inline in the page, in the page's own colors and font.

matplotlib draws with marker colors that are replaced by CSS variables, so that one drawing works in light and dark.
Text stays text and is never read as math; only elements on a short list leave this module.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unpoison.report.text import plain, shortened
from unpoison.results import CLEAN, MIXED, SUSPECT, Interval

# Marker colors: none is drawn as it stands, each becomes the CSS variable of the same name.
INK, LINE, CALM, QUIET, ALERT, GOOD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {
    INK: "--chart-ink",
    LINE: "--chart-line",
    CALM: "--chart-calm",
    QUIET: "--chart-quiet",
    ALERT: "--chart-alert",
    GOOD: "--chart-good",
}
# The density map is a picture and cannot use variables: middle tones that read on white and on near-black.
_REGION_TONES = {CLEAN: (74, 144, 196), MIXED: (139, 147, 161), SUSPECT: (224, 112, 42)}

_WIDTH = 4.6  # inches of 96 CSS pixels: readable when a phone shrinks it to 340 pixels
_ELEMENTS = {"svg", "g", "path", "text", "tspan", "defs", "clipPath", "use", "rect", "image"}
_ATTRIBUTES = {
    *("id", "d", "x", "y", "width", "height", "transform", "style", "viewBox", "clip-path", "href", "role"),
    *("aria-label", "preserveAspectRatio", "class"),
}
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "unpoison",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """Flagged images of one class; ``expected`` is its share of all flagged ones if they were spread evenly."""

    name: str
    size: int
    flagged: int
    expected: float


def class_chart(counts: Sequence[ClassCount], *, limit: int = 16) -> str:
    """Bars of the flagged images per class, most flagged first, with a tick where even spread would put each."""
    shown = sorted(counts, key=lambda entry: -entry.flagged)[:limit]
    names = [shortened(entry.name, 20) for entry in shown]
    most = max((entry.flagged for entry in shown), default=0)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        rows = np.arange(len(shown))
        colors = [ALERT if entry.flagged > 2 * max(entry.expected, 1) else CALM for entry in shown]
        axes.barh(rows, [entry.flagged for entry in shown], color=colors, height=0.62)
        for row, entry in enumerate(shown):
            axes.plot([entry.expected] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=1.1)
            axes.annotate(
                f"{entry.flagged:,}", (max(entry.flagged, entry.expected), row), xytext=(4, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
        axes.set_yticks(rows, labels=names)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, max(most, 1) * 1.14)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("flagged images")

    top = f"{names[0]} has the most: {shown[0].flagged:,}." if shown else ""
    return _svg(draw, height=0.62 + 0.24 * max(len(shown), 2), label=f"Flagged images per class. {top}")


def plane_chart(
    clip_rank: Float[np.ndarray, " n"],
    early_rank: Float[np.ndarray, " n"],
    region: Shaped[np.ndarray, " n"],
    *,
    borders: tuple[float, float] | None = None,
    bins: int = 48,
) -> str:
    """How the images lie on CGD's two axes; the hue of a cell is its most suspicious common region.

    ``borders`` are the ranks where the clean region ends and where the suspect region begins.
    """
    picture = plane_picture(clip_rank, early_rank, region, bins=bins)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(picture, extent=(0, 1, 0, 1), origin="lower", interpolation="nearest", aspect="equal")
        if borders is not None:
            for level, stroke in zip(borders, ("--", "-"), strict=True):
                axes.plot([0, level, level], [level, level, 0], color=INK, linewidth=0.9, linestyle=stroke)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.set_xlabel("CLIP disagrees with the label  →")
        axes.set_ylabel("learnt early  →")

    return _svg(draw, height=4.4, label="Map of the images: rank of CLIP disagreement against rank of early learning.")


def plane_picture(
    clip_rank: Float[np.ndarray, " n"],
    early_rank: Float[np.ndarray, " n"],
    region: Shaped[np.ndarray, " n"],
    *,
    bins: int,
) -> Shaped[np.ndarray, "bins bins 4"]:
    """The density as RGBA bytes, rows from bottom to top; opacity grows with the square root of the count.

    A cell takes the color of the region that most of its images are in. Rows without a rank are left out.
    """
    usable = np.isfinite(clip_rank) & np.isfinite(early_rank)
    codes = list(_REGION_TONES)
    counts = np.stack(
        [
            np.histogram2d(early_rank[chosen], clip_rank[chosen], bins=bins, range=((0, 1), (0, 1)))[0]
            for chosen in (usable & (region == code) for code in codes)
        ]
    )
    total = counts.sum(0)
    # One crowded cell must not make all others invisible.
    full = np.quantile(total[total > 0], 0.98) if total.any() else 1.0
    picture = np.zeros((bins, bins, 4), np.uint8)
    picture[..., :3] = np.array([_REGION_TONES[code] for code in codes], np.uint8)[counts.argmax(0)]
    picture[..., 3] = np.where(total > 0, 30 + 225 * np.sqrt(np.clip(total / full, 0, 1)), 0).astype(np.uint8)
    return picture


def histogram_chart(
    values: Float[np.ndarray, " n"],
    chosen: Bool[np.ndarray, " n"],
    *,
    title: str,
    chosen_name: str,
    rest_name: str,
) -> str:
    """Two groups on one score, each as the share of its own group per bin."""
    usable = np.isfinite(values)
    low, high = (float(values[usable].min()), float(values[usable].max())) if usable.any() else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    edges = np.linspace(low, high if high > low else low + 1, 31)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        groups = ((usable & ~chosen, CALM, rest_name), (usable & chosen, ALERT, chosen_name))
        for group, color, name in groups:
            share = 100 * np.histogram(values[group], edges)[0] / max(int(group.sum()), 1)
            axes.stairs(share, edges, color=color, linewidth=1.4, label=shortened(name, 34))
            axes.stairs(share, edges, color=color, alpha=0.18, fill=True)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel(title)
        axes.set_ylabel("% of the group")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.2, borderpad=0.1)

    return _svg(draw, height=2.3, label=f"Histogram of {title}: {plain(chosen_name)} against {plain(rest_name)}.")


def rates_chart(rows: Sequence[tuple[str, Interval | None, Interval | None]]) -> str:
    """Before and after with 95 % intervals, one line per rate, in percent."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, (_, before, after) in enumerate(rows):
            if before is not None and after is not None:
                axes.plot([before.value, after.value], [row, row], color=QUIET, alpha=0.45, linewidth=2, zorder=1)
            for rate, color, shift in ((before, QUIET, -0.11), (after, GOOD, 0.11)):
                if rate is not None:
                    axes.plot([rate.low, rate.high], [row + shift] * 2, color=color, linewidth=1.6, zorder=2)
                    axes.plot([rate.value], [row + shift], "o", color=color, markersize=5.5, zorder=3)
        axes.plot([], [], "o", color=QUIET, markersize=5.5, label="before")
        axes.plot([], [], "o", color=GOOD, markersize=5.5, label="after")
        axes.set_yticks(range(len(rows)), labels=[name for name, _, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("%")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=2, handlelength=1.2, borderpad=0.1)

    said = "; ".join(
        f"{name} {before.value:.1f} before, {after.value:.1f} after" for name, before, after in rows if before and after
    )
    return _svg(draw, height=0.85 + 0.4 * len(rows), label=f"Rates before and after, in percent. {said}")


def frontier_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    given: Sequence[tuple[float, float]],
    *,
    across: str = "zero-shot accuracy, %",
    connected: bool = True,
) -> str:
    """C-Acc across, excess ASR upwards, in percent: one line of points for each method, stars for the models given.

    ``connected``: whether the points of a method are one line.
    """
    looks = [(CALM, "o"), (ALERT, "s"), (GOOD, "D"), (QUIET, "^"), (INK, "v")]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for at, (name, points) in enumerate(lines.items()):
            color, marker = looks[at % len(looks)]
            filled = color if at < len(looks) else "none"
            axes.plot(
                *zip(*points, strict=True), marker=marker, color=color, markerfacecolor=filled, markersize=5,
                linewidth=1, linestyle="-" if connected else "none", label=shortened(name, 60),
            )  # fmt: skip
        if given:
            axes.plot(*zip(*given, strict=True), "*", color=INK, markersize=8, linestyle="none", label="as given")
        axes.set_xlabel(across)
        axes.set_ylabel("excess ASR, %")
        axes.set_ylim(bottom=min(-2.0, axes.get_ylim()[0]))
        axes.grid()
        columns = 1 if connected else 3
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.6, borderpad=0.1)

    said = "; ".join(
        f"{name}: " + ", ".join(f"{x:.1f} and {y:.1f}" for x, y in points) for name, points in lines.items()
    )
    entries = len(lines) + bool(given)
    height = 2.9 + 0.19 * (entries if connected else -(-entries // 3))
    return _svg(draw, height=height, label=f"Accuracy and excess ASR after each repair, in percent. {said}")


def history_charts(history: Sequence[Mapping[str, float]], *, limit: int = 6) -> list[tuple[str, str]]:
    """One small chart for each quantity that training wrote down: (name, SVG)."""
    keys = list(dict.fromkeys(key for row in history for key in row))
    time = next((key for key in ("step", "steps", "epoch") if key in keys), None)
    drawn = []
    for key in [key for key in keys if key != time][:limit]:
        points = [(row.get(time, at) if time else at, row[key]) for at, row in enumerate(history) if key in row]
        points = [(x, y) for x, y in points if np.isfinite(x) and np.isfinite(y)]
        if points:
            drawn.append((plain(key), _history_chart(shortened(key.replace("_", " "), 30), time or "record", points)))
    return drawn


def _history_chart(name: str, time: str, points: list[tuple[float, float]]) -> str:
    xs, ys = zip(*points, strict=True)

    def draw(figure: Figure) -> None:
        axes: Axes = figure.subplots()
        axes.plot(xs, ys, color=CALM, linewidth=1.5, marker="o" if len(xs) < 25 else "", markersize=3)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel(time)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y")

    label = f"{name} over training: from {ys[0]:.4g} to {ys[-1]:.4g}."
    return _svg(draw, width=3.0, height=1.9, label=label)


def _svg(draw: Callable[[Figure], None], *, height: float, label: str, width: float = _WIDTH) -> str:
    sink = io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # Glyphs that the measuring font lacks are drawn by the reader's own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return _cleaned(sink.getvalue(), width=width, label=label)


def _cleaned(svg: str, *, width: float, label: str) -> str:
    """Only known elements and attributes, no namespaces, ids of its own, CSS variables for colors."""
    prefix = f"c{hashlib.sha256((svg + label).encode()).hexdigest()[:8]}-"
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib wrote it a moment ago
    _clean_element(root, prefix)
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib |= {
        "role": "img",
        "aria-label": plain(label).strip(),
        "style": f"max-width: {round(width * 96)}px",
    }
    return ET.tostring(root, encoding="unicode")


def _clean_element(element: ET.Element, prefix: str) -> None:
    element.tag = _local(element.tag)
    attributes = {_local(name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    for name, value in attributes.items():
        if name not in _ATTRIBUTES or (name == "id" and element.tag == "g"):
            continue
        if name == "href" and not value.startswith(("#", "data:image/png;base64,")):
            continue
        element.set(name, _clean_value(name, value, prefix))
    for child in list(element):
        if _local(child.tag) in _ELEMENTS:
            _clean_element(child, prefix)
        else:
            element.remove(child)
    if element.tag != "text":
        element.text = None
    element.tail = None


def _clean_value(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "clip-path":
        return value.replace("url(#", f"url(#{prefix}")
    if name == "href":
        return f"#{prefix}{value[1:]}" if value.startswith("#") else "".join(value.split())
    if name == "style":
        value = re.sub(r"font-family:[^;]*;?", "", value)
        return re.sub(r"#0([1-6])(?:0\1){2}", _variable, value)
    return " ".join(value.split()) if name in ("d", "transform") else value


def _variable(match: re.Match[str]) -> str:
    return f"var({_VARIABLES[match.group()]})"


def _local(name: object) -> str:
    return str(name).rpartition("}")[2]
