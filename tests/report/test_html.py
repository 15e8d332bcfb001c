"""The page: the right words for each kind of run, and nothing of the data as markup."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from unpoison.errors import UsageError
from unpoison.report.html import render_report, write_report
from unpoison.report.runs import ReportRun, read_run
from unpoison.results import DatasetScan


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts.append(data)
        elif "style" not in self._open:
            self.words.append(data)


def page(*folders: Path) -> Page:
    return Page(render_report([read_run(folder) for folder in folders]))


def test_a_poisoned_scan(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_scan(tmp_path / "my scan", skipped=70))
    assert "Evidence of poisoning: about 5.0 % (4.6 to 5.4 %) of 9,997 images, toward 'airplane'" in seen.text
    assert f"unpoison keep '{tmp_path}/my scan' -o clean.parquet" in seen.text
    assert "unpoison purify cgd MODEL --data data/cifar10_poisoned.parquet -o purified" in seen.text
    assert "CLIP agrees with only 31.0 % of the labels" in seen.text
    assert "74.2 % 10.0 % by chance" in seen.text
    assert "Skipped rows (50 of 70)" in seen.text
    assert seen.text.count("the image is truncated") == 50
    assert planted.NOT_COVERED[1] in seen.text
    for word in ("blake2b:5f2c9a1e0d77", "clip_logit_scale", "3 min 7 s", "unpoison 0.1.0", "train-00000-of-00001:0"):
        assert word in seen.text


def test_a_clean_scan(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_scan(tmp_path / "scan", poisoned=False))
    assert "No evidence of poisoning was found. This does not prove the data clean." in seen.text
    assert "Evidence of poisoning:" not in seen.text
    assert "unpoison keep" not in seen.text
    assert "No image is flagged in any class." in seen.text


def test_a_weak_clip_is_inconclusive(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_scan(tmp_path / "scan", poisoned=False, clip_agreement=14.0))
    assert "Inconclusive: nothing was found" in seen.text
    assert "No evidence of poisoning was found." not in seen.text


def test_odd_labels_are_inconclusive_and_say_what_to_do(tmp_path: Path, planted: ModuleType) -> None:
    names = ("plane", "<b>car</b>", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    folder = planted.write_scan(tmp_path / "scan", poisoned=False, class_names=names)
    scan = DatasetScan.load(folder / "scan.json")
    replace(scan, estimate=replace(scan.estimate, odd_labels=(1,))).save(folder / "scan.json")
    seen = page(folder)
    assert "Inconclusive: label '<b>car</b>' looks odd." in seen.text
    assert "No evidence of poisoning was found." not in seen.text
    assert "Do they show what their label says?" in seen.text
    assert "unpoison purify cgd MODEL" in seen.text


def test_an_accepted_purification(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_purification(tmp_path / "out"))
    assert "Accepted: the attack's success above chance went from 96.6 % to 0.3 %" in seen.text
    assert "99.0 % 98.7 to 99.2 n = 9,000 2.8 % 2.5 to 3.0 n = 9,000 −96.2" in seen.text  # noqa: RUF001
    assert "DER – 97.9 %" in seen.text  # noqa: RUF001
    assert "a fall of at most 1 points is accepted" in seen.text
    assert "Where the flagged images are" in seen.text
    assert "Training history" in seen.text
    assert len([tag for tag, _ in seen.tags if tag == "svg"]) == 1 + 3 + 1 + 1 + 3


def test_a_refused_purification_without_tests(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_purification(tmp_path / "out", accepted=False, evaluated=False))
    assert "Not accepted: do not rely on this purified model." in seen.text
    assert "past the bound of 1.0" in seen.text
    assert "No test set was given" in seen.text
    assert "Use the purified model" not in seen.text


@pytest.mark.parametrize(("attack", "word"), [(True, "Backdoor works"), (False, "No attack tested")])
def test_a_lone_evaluation(tmp_path: Path, planted: ModuleType, attack: bool, word: str) -> None:
    planted.evaluation(before=True, attack=attack).save(tmp_path / "evaluation.json")
    seen = page(tmp_path / "evaluation.json")
    assert word in seen.text
    assert ("with the trigger 99.0 % go to 'airplane', 2.4 % without it" in seen.text) == attack
    assert "74.5 % (73.6 to 75.3 %) of 10,000 clean images" in seen.text


def test_several_runs_have_contents_and_a_summary(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_scan(tmp_path / "one"), planted.write_purification(tmp_path / "two"))
    links = [attributes["href"] for tag, attributes in seen.tags if tag == "a"]
    ids = {attributes.get("id") for _, attributes in seen.tags}
    assert links
    assert all(link and link[1:] in ids for link in links)
    assert "All runs at a glance" in seen.text
    assert [tag for tag, _ in seen.tags].count("h1") == 1


def test_ids_are_unique_and_headings_step_by_one(tmp_path: Path, planted: ModuleType) -> None:
    for seen in (
        page(planted.write_purification(tmp_path / "a")),
        page(planted.write_scan(tmp_path / "b"), planted.write_purification(tmp_path / "c", accepted=False)),
    ):
        # Equal charts of two runs may share their ids: the same shapes lie behind both.
        ids = [a["id"] for tag, a in seen.tags if "id" in a and tag not in ("path", "clippath")]
        assert len(ids) == len(set(ids))
        levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_hostile_names_stay_text(tmp_path: Path, planted: ModuleType) -> None:
    folder = planted.write_scan(
        tmp_path / "<i>run", class_names=planted.HOSTILE_CLASSES, source="<b>x</b>';alert(5)//", skipped=1
    )
    html = render_report(
        [read_run(folder), read_run(planted.write_purification(tmp_path / "p", class_names=planted.HOSTILE_CLASSES))]
    )
    seen = Page(html)
    names = {tag for tag, _ in seen.tags}
    assert not names & {"i", "iframe", "object", "embed", "link", "form", "base"}
    assert [tag for tag, _ in seen.tags].count("script") == 1
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    sources = [a.get("src") or a.get("href") or "" for _, a in seen.tags if "src" in a or "href" in a]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    for name in planted.HOSTILE_CLASSES[:7]:
        assert name in seen.text
    assert "\\u202egnp.exe\\u0000\\u001b[31m" in seen.text
    assert "\u202e" not in html
    assert "49" not in [word for word in seen.words if word.strip() == "49"]


def test_the_policy_names_the_one_script(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_scan(tmp_path / "scan"))
    (policy,) = [a["content"] or "" for tag, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = seen.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe-eval" not in policy


def test_no_script_without_examples(tmp_path: Path, planted: ModuleType) -> None:
    seen = page(planted.write_scan(tmp_path / "scan", samples=False))
    assert seen.scripts == []
    assert not [a for _, a in seen.tags if "script-src" in (a.get("content") or "")]


def test_a_run_without_tables(tmp_path: Path, planted: ModuleType) -> None:
    folder = planted.write_scan(tmp_path / "scan")
    bare = replace(read_run(folder), scores=None, split=None, samples=())
    assert "toward 'airplane'" in Page(render_report([bare])).text


def test_the_same_runs_give_the_same_page(tmp_path: Path, planted: ModuleType) -> None:
    folder = planted.write_scan(tmp_path / "scan")
    assert render_report([read_run(folder)]) == render_report([read_run(folder)])


def test_errors(tmp_path: Path, planted: ModuleType) -> None:
    with pytest.raises(UsageError, match="at least one run"):
        write_report(tmp_path / "report.html", [])
    with pytest.raises(UsageError, match="no result"):
        render_report([ReportRun(name="x", path="x")])
    planted.evaluation(before=True).save(tmp_path / "evaluation.json")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(tmp_path / "missing" / "report.html", [read_run(tmp_path / "evaluation.json")])
    write_report(tmp_path / "report.html", [read_run(tmp_path / "evaluation.json")])
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
