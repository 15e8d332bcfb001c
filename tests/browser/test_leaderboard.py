"""The leaderboard in a real browser: offline, quiet, sorted and searched by the reader, readable on a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright

from unpoison.benchmark.rows import Row, Value
from unpoison.benchmark.settings import GIVEN
from unpoison.benchmark.summary import MethodSummary, Summary
from unpoison.benchmark.table import Comparison, Failure, Picture, Table
from unpoison.report.leaderboard import render_leaderboard

pytestmark = pytest.mark.browser
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # one pixel


def value(mean: float, *, seeds: int = 3) -> Value:
    return Value(mean=mean, std=0.5 if seeds > 1 else None, low=mean - 1, high=mean + 1, seeds=seeds)


def row(attack: str, method: str, excess: float | None, *, kind: str = "classifier") -> Row:
    values = {"c_acc_before": value(90.0), "c_acc": value(90.0 if method == GIVEN else 88.0)}
    if excess is not None:
        values |= {name: value(excess + extra) for name, extra in (("asr", 1.0), ("asr_excess", 0.0), ("ra", -20.0))}
        values |= {"asr_before": value(95.0), "asr_floor": value(1.0)}
    if method != GIVEN:
        values |= {"seconds": value(12.0), "changed": value(100.0)}
    return Row(
        data="shapes", model="net", kind=kind, attack=attack, rate=0.05, method=method, seeds=(0, 1, 2), values=values,
        n=1000, attacked=0 if excess is None else 900, refused=0, left_alone=0, keys=("a" * 16,),
        command="unpoison bench run g.toml --cell aaaaaaaaaaaaaaaa -o out",
    )  # fmt: skip


def summed(method: str, excess: float) -> MethodSummary:
    return MethodSummary(
        method=method, excess=excess, worst_excess=excess, fall=2.0, worst_fall=3.0, ra=70.0, control_fall=1.0,
        adaptive=None, worst_adaptive=None, processor=12.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    rows = (
        row("clean", GIVEN, None), row("clean", "cgd", None), row("badnet", GIVEN, 94.0), row("badnet", "cgd", 10.0),
        row("badnet", "ft", 9.0), row("<script>alert(1)</script>", "cgd", 100.0),
    )  # fmt: skip
    failure = Failure(key="b" * 16, names=_names(), status="timed out", reason="<img src=x>", command="unpoison again")
    table = Table(
        title="planted <b>grid</b>", rows=rows, failures=(failure,), missing=1, cells=9, notes=("g: not run",),
        pictures=(Picture(data="shapes", model="net", attack="badnet", png=DOT),),
        summaries=(
            Summary(kind="classifier", methods=(summed("cgd", 10.0), summed("ft", 9.0)), over="Means over badnet."),
        ),
        reported=(
            Comparison(attack="badnet", method="cgd", asr=0.5, c_acc=None, our_asr=value(11.0), our_c_acc=value(88.0),
                       setting="<i>large</i>", source="Doe, 2024"),
        ),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("board") / "leaderboard.html"
    file.write_text(render_leaderboard(table), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = _launch(playwright)
        context = browser.new_context(offline=True, viewport={"width": 1360, "height": 900})
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: said.append(request.url) if request.url[:4] in ("http",) else None)

        def refuse(dialog: Dialog) -> None:
            said.append(dialog.message)
            dialog.dismiss()

        page.on("dialog", refuse)
        page.goto(file.as_uri())
        yield page
        assert said == []
        browser.close()


def _names():
    from unpoison.benchmark.cell import Names

    return Names(data="shapes", model="net", attack="wanet", rate=0.05, method="cgd", seed=0)


def _launch(playwright) -> Browser:
    system = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    program = system or playwright.chromium.executable_path
    if not Path(program).exists():
        reason = "no Chromium was found; tools/browser.sh installs one"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    expect.set_options(timeout=60_000)  # a loaded machine is slow, not wrong
    return playwright.chromium.launch(executable_path=program, args=["--headless", "--no-sandbox", "--disable-gpu"])


def column(page: Page, title: str) -> list[str]:
    heads = page.locator("#all-rows thead th").all_inner_texts()
    place = next(at for at, text in enumerate(heads) if text.strip().startswith(title))
    return [
        text.split("\n")[0] for text in page.locator(f"#all-rows tbody tr td:nth-child({place + 1})").all_inner_texts()
    ]


def test_columns_sort_by_number_with_nothing_measured_last(page: Page) -> None:
    button = page.locator("#all-rows thead button", has_text="excess ASR")
    button.click()
    assert column(page, "excess ASR") == ["9.0", "10.0", "94.0", "100.0", "–", "–"]  # noqa: RUF001
    button.click()
    assert column(page, "excess ASR") == ["100.0", "94.0", "10.0", "9.0", "–", "–"]  # noqa: RUF001
    assert page.locator("#all-rows thead th[aria-sort='descending']").count() == 1
    page.locator("#all-rows thead button", has_text="RA").click()
    assert column(page, "RA")[0] == "80.0"  # more is better: the first click shows it first


def test_rows_are_found_by_words(page: Page) -> None:
    field = page.get_by_placeholder("badnet cgd")
    field.fill("badnet ft")
    assert page.locator("#all-rows tbody tr:visible").count() == 1
    field.fill("")
    assert page.locator("#all-rows tbody tr:visible").count() == 6


def test_attacks_have_pictures_and_nothing_of_the_data_is_markup(page: Page) -> None:
    assert page.locator("section h3", has_text="badnet").count() == 1
    assert page.get_by_alt_text("A test image without and with the trigger of badnet").is_visible()
    assert page.locator("section h3", has_text="<script>alert(1)</script>").count() == 1
    assert page.locator("img[src='x']").count() == 0
    assert page.get_by_text("timed out").is_visible()
    assert page.locator("figure svg").count() >= 1
    page.locator("#all-rows details summary").first.click()
    assert page.get_by_text("unpoison bench run g.toml --cell aaaaaaaaaaaaaaaa -o out").first.is_visible()


def test_the_methods_at_a_glance_say_what_they_are_over(page: Page) -> None:
    assert page.get_by_text("Means over badnet.").is_visible()
    rows = page.locator("#methods-classifier tbody tr").all_inner_texts()
    assert [text.split()[:2] for text in rows] == [["cgd", "10.0"], ["ft", "9.0"]]


def test_what_papers_report_stands_beside_ours(page: Page) -> None:
    shown = page.get_by_role("region", name="What papers report of badnet")
    assert shown.locator("tbody td").all_inner_texts() == ["0.5", "11.0", "–", "88.0", "<i>large</i>", "Doe, 2024"]  # noqa: RUF001
    assert page.locator("[id$='-papers']").count() == 1


def test_the_page_fits_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
