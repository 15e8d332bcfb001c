"""Strings from data become printable, figures get their units."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpoison.report.text import change, columns, counted, duration, plain, shortened


@given(st.text())
def test_plain_text_is_one_printable_encodable_line(text: str) -> None:
    shown = plain(text)
    shown.encode("utf-8")
    assert not [character for character in shown if character in "\n\r\t\x00\x1b\u202e\u2066\u2028\x85"]


def test_hidden_characters_are_shown() -> None:
    assert plain("a\u202eb\x00c\nd\ud800") == "a\\u202eb\\u0000c d\\ud800"
    assert plain("電車 🚋 $x$ <b>") == "電車 🚋 $x$ <b>"


@given(st.text(), st.integers(2, 30))
def test_shortened_fits(text: str, width: int) -> None:
    assert columns(shortened(text, width)) <= width


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (42.4, "42 s"), (185.2, "3 min 5 s"), (7_800.0, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_signs() -> None:
    assert counted(1, "class", "classes") == "1 class"
    assert counted(1000, "class", "classes") == "1,000 classes"
    assert change(-96.24) == "−96.2"  # noqa: RUF001
    assert change(0.1) == "+0.1"
