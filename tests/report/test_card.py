"""The model card: figures and limits, and strings that no Markdown renderer takes for markup."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from unpoison.report.card import code, model_card, write_card
from unpoison.report.text import plain
from unpoison.results import Purification

MARKDOWN = MarkdownIt("commonmark").enable("table")


@pytest.fixture
def result(tmp_path: Path, planted: ModuleType) -> Purification:
    return Purification.load(planted.write_purification(tmp_path / "out") / "purification.json")


def test_what_a_card_says(result: Purification, planted: ModuleType) -> None:
    card = model_card(result, class_names=planted.CLASSES, architecture="small-resnet", image_size=32)
    assert card.startswith("---\nlibrary_name: unpoison\n")
    assert "Accepted Held-out accuracy fell by 0.3 points, within the bound of 1.0." in card
    assert "| base model | `victim/` |" in card
    assert "| ASR | 99.0 % (98.7 to 99.2), n = 9,000 | 2.8 % (2.5 to 3.0), n = 9,000 | −96.2 |" in card  # noqa: RUF001
    assert "about 5.0 % (4.6 to 5.4 %) of the images toward `airplane`" in card
    assert "| `beta` | `0.025` |" in card
    assert "blake2b:77aa01d2" in card
    assert planted.NOT_COVERED[1] in card


def test_a_refused_model_says_so_first(result: Purification) -> None:
    card = model_card(replace(result, accepted=False, before=None, after=None), base_model="m")
    assert card.index("Not accepted: do not rely on this model") < card.index("base model")
    assert "No test set was given" in card


def test_hostile_strings_are_inert(result: Purification, planted: ModuleType, tmp_path: Path) -> None:
    evil = "x | y ` <img src=x onerror=alert(1)> [a](javascript:alert(2)) ![b](http://c) **d**\n# e"
    assert result.before is not None
    changed = replace(
        result,
        reason=evil,
        protects=f"- {evil}",
        config={evil: evil},
        inputs={evil: evil},
        not_covered=(evil, "http://example.org", "_x_", "1. x"),
        before=replace(result.before, model=evil),
        after=replace(result.before, data=evil, attack=evil, target=evil),
    )
    write_card(tmp_path / "card.md", changed)
    card = model_card(changed, class_names=(*planted.HOSTILE_CLASSES, evil), architecture=evil)
    assert_inert(card)
    assert_inert((tmp_path / "card.md").read_text(encoding="utf-8"))
    assert card.count("<img") > 5


def assert_inert(card: str) -> None:
    body = card.split("---\n", 2)[2]
    tokens = [child for token in MARKDOWN.parse(body) for child in (token, *(token.children or []))]
    assert not [token.type for token in tokens if token.type.startswith(("html", "image"))]
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2507.05113"]
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert titles[0] == "Purified image classifier"
    assert set(titles[1:]) <= {
        *("What is safe to use", "Before and after", "Data", "Method configuration", "Limits", "Classes"),
    }


@given(st.text())
def test_a_code_span_gives_its_text_back(text: str) -> None:
    (paragraph,) = [token for token in MARKDOWN.parse(f"a {code(text)} b") if token.type == "inline"]
    spans = [child.content for child in paragraph.children or [] if child.type == "code_inline"]
    assert [span.split() for span in spans] == [(plain(text).strip() or "(empty)").split()]


@given(st.text())
def test_a_cell_stays_one_cell(text: str) -> None:
    tokens = MARKDOWN.parse(f"| a | b |\n| --- | --- |\n| {code(text, cell=True)} | x |\n")
    assert [token.type for token in tokens].count("td_open") == 2
    cells = [token.content for token in tokens if token.type == "inline"]
    assert cells[-1] == "x"
