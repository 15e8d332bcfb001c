"""The report and the card of a repaired CLIP: the verdict in words, the rates, the looks, and nothing as markup."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt

from unpoison.clip_results import ClipPurification
from unpoison.report.clip_card import clip_card
from unpoison.report.clip_views import clip_verdict
from unpoison.report.html import render_report
from unpoison.report.runs import read_run


@pytest.fixture(scope="module")
def reading() -> ModuleType:
    """The parser of the other report tests."""
    spec = importlib.util.spec_from_file_location("test_html", Path(__file__).with_name("test_html.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_repaired_clip(tmp_path: Path, planted: ModuleType, reading: ModuleType) -> None:
    seen = reading.page(planted.write_clip_purification(tmp_path / "out"))
    for shown in (
        "Accepted: the attack's success above chance went from 97.0 % to 0.5 %, zero-shot accuracy from 57.5 % to",
        "99.0 % 98.0 to 100.0 n = 9,000 3.0 % 2.0 to 4.0 n = 9,000 −96.0",  # noqa: RUF001
        "R@1, image to text 31.0 % 30.0 to 32.0 n = 800 29.0 %",
        "Retrieval ASR 90.0 %",
        "images -0.081 0.612",
        "Measured on 10,000 images and 5,000 texts in 512 dimensions",
        "60.0 % (1.0 % by chance, n = 250)",
        "600 of 600, 128 pairs each",
        "Held-out pairs that find each other.",
        "unpoison purify par model --pairs 'flickr 8k' --seed 3",
        "seed 3",
        "torch 2.13.0",
        "blake2b:77aa01d2",
        "the image is truncated",
        "The attack badnet-stripes on 9,000 test images.",
        "Make indexes, heads and connectors again",
        planted.NOT_COVERED[1],
    ):
        assert shown in seen.text, shown
    # one chart of the rates and a curve for each of five quantities
    assert len([tag for tag, _ in seen.tags if tag == "svg"]) == 1 + 5
    levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize(
    ("how", "tone", "sentence"),
    [
        ({"accepted": False}, "alert", "Not accepted: do not rely on this purified CLIP."),
        ({"left": True}, "alert", "The trigger still works, though the model kept its pairs: the attack's success"),
        ({"attack": False}, "ok", "Accepted: zero-shot accuracy went from 57.5 % to 55.1 %; no attack was tested."),
        ({"evaluated": False}, "ok", "Accepted: held-out pairs find each other in 60.0 % of cases, 61.0 % before; no"),
    ],
)
def test_verdicts(
    how: dict[str, Any], tone: str, sentence: str, tmp_path: Path, planted: ModuleType, reading: ModuleType
) -> None:
    folder = planted.write_clip_purification(tmp_path / "out", **how)
    verdict = clip_verdict(ClipPurification.load(folder / "purification.json"))
    assert verdict.tone == tone
    assert verdict.sentence.startswith(sentence)
    seen = reading.page(folder)
    assert sentence in seen.text
    assert ("Use the purified model" in seen.text) == (tone == "ok")
    if how == {"accepted": False}:
        assert "par diverged at step 412" in seen.text
        assert "lower --learning-rate" in seen.text
    if how == {"evaluated": False}:
        assert "No test images were given" in seen.text
        assert "unpoison purify par MODEL --pairs PAIRS --test LABELLED_IMAGES" in seen.text


def test_beside_another_run_and_from_its_file(tmp_path: Path, planted: ModuleType, reading: ModuleType) -> None:
    folder = planted.write_clip_purification(tmp_path / "clip")
    seen = reading.page(planted.write_scan(tmp_path / "scan", samples=False), folder)
    assert "All runs at a glance" in seen.text
    assert "57.5 % → 55.1 % 97.0 % → 0.5 %" in seen.text
    alone = read_run(folder / "purification.json")
    assert alone.clip == ClipPurification.load(folder / "purification.json")
    assert alone.purification is None


def test_several_repairs_draw_a_frontier(tmp_path: Path, planted: ModuleType, reading: ModuleType) -> None:
    folders = [planted.write_clip_purification(tmp_path / name, left=name == "b") for name in "abc"]
    own = ClipPurification.load(folders[2] / "purification.json")
    replace(own, config=own.config | {"text_tower": "frozen", "crop": 2}).save(folders[2] / "purification.json")
    assert "lower right corner" not in reading.page(folders[0]).text
    seen = reading.page(*folders)
    assert "the lower right corner is best" in seen.text
    (label,) = [
        attributes["aria-label"]
        for tag, attributes in seen.tags
        if tag == "svg" and attributes["aria-label"].startswith("Accuracy and excess ASR")
    ]
    assert label.endswith("par: 55.1 and 0.5, 55.1 and 37.5; par, beyond the paper: 55.1 and 0.5")
    untested = planted.write_clip_purification(tmp_path / "d", attack=False)
    assert "lower right corner" not in reading.page(folders[0], untested).text


def test_strings_of_strangers_stay_text(tmp_path: Path, planted: ModuleType, reading: ModuleType) -> None:
    evil = " | ` <img src=x onerror=alert(1)> [a](javascript:alert(2)) **d** {{ 7 * 7 }} \u202e"
    folder = planted.write_clip_purification(tmp_path / "out", name=evil)
    html = render_report([read_run(folder)])
    seen = reading.Page(html)
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert "img" not in {tag for tag, _ in seen.tags}
    assert "\u202e" not in html
    assert seen.text.count("<img src=x onerror=alert(1)>") > 5
    assert "{{ 7 * 7 }}" in seen.text
    card = clip_card(ClipPurification.load(folder / "purification.json"), base_model=evil)
    assert "\u202e" not in card
    tokens = MarkdownIt("commonmark").enable("table").parse(card)
    inline = [child for token in tokens for child in token.children or ()]
    links = {child.attrs.get("href") for child in inline if child.type == "link_open"}
    assert links == {"https://arxiv.org/abs/2412.00727"}
    assert not [token for token in (*tokens, *inline) if token.type in ("html_block", "html_inline", "image")]


def test_what_a_card_says(tmp_path: Path, planted: ModuleType) -> None:
    result = ClipPurification.load(planted.write_clip_purification(tmp_path / "a") / "purification.json")
    card = clip_card(result, base_model="victim", library="transformers")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: zero-shot-image-classification\n")
    for shown in (
        "Accepted. Held-out pairs find each other in 60.0 percent of cases, 61.0 before.",
        "| base model | `victim` |",
        "| ASR | 99.0 % (98.0 to 100.0), n = 9,000 | 3.0 % (2.0 to 4.0), n = 9,000 | −96.0 |",  # noqa: RUF001
        "| mean cosine with the given model, images | 1 | -0.080 |",
        "attack `badnet-stripes`, target `airplane`",
        "| `tau` | `2.15` |",
        "| `model` | `blake2b:77aa01d2` |",
        "4,750 trained on, 250 held out",
        planted.NOT_COVERED[1],
    ):
        assert shown in card, shown
    untested = ClipPurification.load(
        planted.write_clip_purification(tmp_path / "b", accepted=False, evaluated=False) / "purification.json"
    )
    refused = clip_card(untested, base_model="victim")
    assert refused.index("Not accepted: do not rely on this model") < refused.index("base model")
    assert "No test images were given, and no attack was tested." in refused
    assert "library_name" not in refused
    left = ClipPurification.load(planted.write_clip_purification(tmp_path / "c", left=True) / "purification.json")
    assert left.attack_left
    assert "still works on this model" in clip_card(left, base_model="victim")
