"""Charts: valid, self-contained SVG in which every name stays a name."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from unpoison.report.charts import (
    ClassCount,
    class_chart,
    histogram_chart,
    history_charts,
    plane_chart,
    plane_picture,
    rates_chart,
)
from unpoison.results import CLEAN, SKIPPED, SUSPECT, Interval

NAMES = ["<script>alert(1)</script>", "$\\alpha$ & $x$", "\x00\u202e\ud800", "電車 🚋", "]]>", ""]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("text")]  # noqa: S314


def counts(names: list[str]) -> list[ClassCount]:
    return [ClassCount(name=name, size=100, flagged=9 - at, expected=3.5) for at, name in enumerate(names)]


def test_names_are_text_and_never_math() -> None:
    svg = class_chart(counts(NAMES))
    shown = texts(svg)
    assert "$\\alpha$ & $x$" in shown
    assert "<script>alert(1)</s…" in shown
    assert "\\u0000\\u202e\\ud800" in shown
    assert "<script" not in svg
    svg.encode("utf-8")


def test_only_known_elements_leave() -> None:
    svg = class_chart(counts(NAMES))
    for word in ("<style", "<metadata", "xlink", "http", "#0101", "DejaVu"):
        assert word not in svg
    assert "var(--chart-ink)" in svg
    assert ET.fromstring(svg).get("aria-label", "").startswith("Flagged images per class. <script>")  # noqa: S314


def test_ids_of_two_charts_do_not_meet() -> None:
    one, two = class_chart(counts(["a", "b"])), class_chart(counts(["a", "c"]))
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((one, two), ids, strict=True):
        assert set(re.findall(r"#([\w-]+)", svg)) <= own


def test_same_input_same_chart() -> None:
    assert class_chart(counts(NAMES)) == class_chart(counts(NAMES))


def test_a_thousand_classes_show_the_most_flagged() -> None:
    many = [ClassCount(name=f"class {at}", size=10, flagged=at, expected=1.0) for at in range(1000)]
    shown = texts(class_chart(many))
    assert "class 999" in shown
    assert "class 10" not in shown


def test_plane_density_counts_cells_and_takes_the_common_region() -> None:
    clip = np.array([0.9, 0.9, 0.9, 0.1, np.nan])
    early = np.array([0.9, 0.9, 0.9, 0.1, np.nan])
    region = np.array([SUSPECT, SUSPECT, CLEAN, CLEAN, SKIPPED], np.int8)
    picture = plane_picture(clip, early, region, bins=2)
    assert picture.shape == (2, 2, 4)
    assert picture[1, 1, 0] > picture[1, 1, 2]  # orange
    assert picture[0, 0, 2] > picture[0, 0, 0]  # blue
    assert picture[1, 1, 3] > picture[0, 0, 3] > 0
    assert picture[0, 1, 3] == picture[1, 0, 3] == 0


@pytest.mark.parametrize("values", [np.zeros(0), np.full(3, np.nan), np.array([0.5]), np.array([-3.0, 8.0])])
def test_odd_scores_still_draw(values: np.ndarray) -> None:
    region = np.zeros(len(values), np.int8)
    assert plane_chart(values, values, region).startswith("<svg")
    chosen = np.zeros(len(values), bool)
    svg = histogram_chart(values, chosen, title="$x$", chosen_name="<b>", rest_name="rest")
    assert "$x$" in texts(svg)
    assert "<b>" in texts(svg)


def test_borders_are_drawn_when_given() -> None:
    values = np.linspace(0.01, 1, 50)
    region = np.zeros(50, np.int8)
    plain = plane_chart(values, values, region)
    assert plane_chart(values, values, region, borders=(0.8, 0.9)).count("stroke-dasharray") == 1
    assert plain.count("stroke-dasharray") == 0


def test_rates_with_a_missing_side() -> None:
    rate = Interval(value=50.0, low=40.0, high=60.0, n=100)
    assert "ASR" in texts(rates_chart([("C-Acc", rate, rate), ("ASR", None, rate)]))


def test_history_draws_each_quantity_against_the_steps() -> None:
    rows = [{"step": float(at), "loss": 1.0 / (at + 1), "held_out_accuracy": 70.0} for at in range(5)]
    drawn = history_charts(rows)
    assert [name for name, _ in drawn] == ["loss", "held_out_accuracy"]
    assert "step" in texts(drawn[0][1])
    assert history_charts([]) == []
    assert history_charts([{"loss": float("nan")}]) == []
