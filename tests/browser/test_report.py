"""The report in a real browser: offline, quiet, readable on a phone, and usable."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright

from unpoison.keep import read_decisions
from unpoison.report.html import write_report
from unpoison.report.runs import read_run

pytestmark = pytest.mark.browser
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        system = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
        program = system or playwright.chromium.executable_path
        if not Path(program).exists():
            reason = "no Chromium was found; tools/browser.sh installs one"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        expect.set_options(timeout=60_000)  # a loaded machine is slow, not wrong
        browser = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Seen:
    """What a page asked for and said while it was open."""

    page: Page
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def refuse(self, dialog: Dialog) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def assert_quiet(self) -> None:
        assert [address for address in self.requests if not address.startswith("data:")] == [self.page.url]
        assert self.console == []
        assert self.dialogs == []


def written(report: Path, *runs: Path) -> Path:
    write_report(report, [read_run(run) for run in runs])
    return report


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory, planted: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("two")
    scan, purification = planted.write_scan(folder / "scan"), planted.write_purification(folder / "out")
    return written(folder / "report.html", scan, purification)


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    contexts = []

    def open_report(*runs: Path, report: Path | None = None, **options: Any) -> Seen:
        report = report or written(tmp_path / "report.html", *runs)
        context = browser.new_context(offline=True, **options)
        context.set_default_timeout(120_000)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("console", lambda message: seen.console.append(message.text))
        seen.page.on("pageerror", lambda error: seen.console.append(str(error)))
        seen.page.on("dialog", seen.refuse)
        seen.page.goto(report.as_uri())
        return seen

    yield open_report
    for context in contexts:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_everything_shows_and_nothing_is_fetched(show: Any, two_runs: Path, scheme: str, width: int) -> None:
    seen = show(report=two_runs, viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = seen.page
    expect(page.get_by_role("heading", name="Evidence of poisoning: about 5.0 % (4.6 to 5.4 %)")).to_be_visible()
    expect(page.get_by_role("heading", name="Accepted: the attack's success above chance")).to_be_visible()
    boxes = page.evaluate(
        "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(boxes) == 14
    assert all(wide > 100 and high > 50 for wide, high in boxes)
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 120
    assert min(widths) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    seen.assert_quiet()


def test_hostile_names_are_shown_and_not_run(show: Any, tmp_path: Path, planted: ModuleType) -> None:
    classes = planted.HOSTILE_CLASSES
    scan = planted.write_scan(
        tmp_path / "<img src=x onerror=alert(9)>", class_names=classes, source="<script>alert(8)</script>"
    )
    seen = show(
        scan, planted.write_purification(tmp_path / "out", class_names=classes), viewport={"width": 390, "height": 844}
    )
    page = seen.page
    for text in (classes[0], classes[1], "<script>alert(8)</script>", "<img src=x onerror=alert(9)>"):
        expect(page.get_by_text(text).first).to_be_visible()
    assert page.locator("svg text", has_text="<img src=x").count() >= 1
    assert page.locator("svg text", has_text="$\\frac{1}{2}$ & $5").count() >= 1
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("script").count() == 1
    seen.assert_quiet()


def test_script_put_into_the_page_is_refused(show: Any, tmp_path: Path, planted: ModuleType) -> None:
    """The policy holds even if the escaping should ever fail."""
    planted.write_scan(tmp_path / "scan")
    page = show(tmp_path / "scan").page
    page.evaluate(
        "() => { const node = document.createElement('div');"
        ' node.innerHTML = \'<img src="data:," onerror="window.hit = 1">\';'
        " document.body.append(node); const script = document.createElement('script');"
        " script.textContent = 'window.hit = 1';"
        " document.body.append(script); }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.hit === undefined")


def test_sort_filter_mark_and_export(show: Any, tmp_path: Path, planted: ModuleType) -> None:
    seen = show(planted.write_scan(tmp_path / "scan"), accept_downloads=True)
    page = seen.page
    samples = page.locator(".sample:visible")

    page.get_by_label("Sort by").select_option("early")
    early = page.evaluate("[...document.querySelector('.gallery').children].map(item => Number(item.dataset.early))")
    assert early == sorted(early, reverse=True)
    assert len(set(early)) > 10

    assert samples.count() == 60
    page.get_by_label("Show").select_option("clean")
    assert samples.count() == 12
    page.get_by_label("Show").select_option("")
    ids = [
        json.loads(item)
        for item in page.evaluate("[...document.querySelectorAll('.sample')].map(item => item.dataset.id)")
    ]
    page.get_by_label("Find").fill(ids[5])
    assert samples.count() == len([name for name in ids if ids[5] in name])
    page.get_by_label("Find").fill("")

    samples.nth(0).get_by_role("button", name="Drop").click()
    samples.nth(1).get_by_role("button", name="Keep").click()
    samples.nth(2).get_by_role("button", name="Drop").click()
    samples.nth(2).get_by_role("button", name="Drop").click()  # taken back
    expect(page.get_by_text("1 to keep, 1 to drop.")).to_be_visible()
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save decisions").click()
    assert waiting.value.suggested_filename == "decisions.json"
    waiting.value.save_as(tmp_path / "decisions.json")
    assert read_decisions(tmp_path / "decisions.json") == {ids[0]: "drop", ids[1]: "keep"}
    assert seen.console == []


def test_readable_without_script(show: Any, tmp_path: Path, planted: ModuleType) -> None:
    page = show(planted.write_scan(tmp_path / "scan"), java_script_enabled=False).page
    expect(page.get_by_role("heading", name="The most suspicious images")).to_be_visible()
    assert page.locator(".sample:visible").count() == 60
    expect(page.get_by_role("button", name="Save decisions")).to_be_hidden()


def test_poisoned_training_data_make_no_green_headline(show: Any, tmp_path: Path, planted: ModuleType) -> None:
    seen = show(planted.write_model_scan(tmp_path / "scan"), viewport={"width": 390, "height": 844})
    headline = seen.page.get_by_role("heading", name="The data that the model was trained on are poisoned.")
    expect(headline).to_be_visible()
    banner = seen.page.locator("header.verdict")
    expect(banner).to_have_class(re.compile("alert"))
    expect(banner.get_by_text("Poisoned data", exact=True)).to_be_visible()
    expect(seen.page.get_by_role("heading", name="Data verdict: poisoned")).to_be_visible()
    expect(seen.page.get_by_role("heading", name="Weights verdict: no evidence")).to_be_visible()
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
    seen.assert_quiet()
