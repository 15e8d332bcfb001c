"""Words and numbers as a report shows them: strings from data made harmless to read, figures with their units."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from unpoison.results import Interval

_TURNS_TEXT_AROUND = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_BREAKS_LINES = {"Zl", "Zp"}
_INVISIBLE = {"Cc", "Cs"}


def plain(text: object) -> str:
    """The text on one line, with control, bidi and surrogate characters written out as ``\\uXXXX``.

    HTML and SVG escaping come after this; it keeps the output valid XML and UTF-8, and what is shown what is there.
    """
    shown = []
    for character in str(text):
        kind = unicodedata.category(character)
        if character in "\t\n\r" or kind in _BREAKS_LINES:
            shown.append(" ")
        elif kind in _INVISIBLE or ord(character) in _TURNS_TEXT_AROUND or ord(character) in (0xFFFE, 0xFFFF):
            shown.append(f"\\u{ord(character):04x}")
        else:
            shown.append(character)
    return "".join(shown)


def shortened(text: object, width: int) -> str:
    """:func:`plain`, cut to ``width`` columns (wide characters count twice) with an ellipsis."""
    shown = plain(text)
    if columns(shown) <= width:
        return shown
    kept = ""
    for character in shown:
        if columns(kept + character) > width - 1:
            break
        kept += character
    return f"{kept}…"


def columns(text: str) -> int:
    """How many columns the text takes, where East Asian wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def count(number: int) -> str:
    return f"{number:,}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 image``, ``10,000 images``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def purity_sentence(purity: Mapping[str, float | None]) -> str:
    """How pure the trusted samples of each class were, by the manifest: those below 100 percent first, by name."""
    known = {name: value for name, value in purity.items() if value is not None}
    below = sorted((value, name) for name, value in known.items() if value < 100)
    pure = len(known) - len(below)
    parts = [f"{shortened(name, 40)} {percent(value)}" for value, name in below]
    parts += [f"{'the other ' if below else ''}{counted(pure, 'class', 'classes')} {percent(100.0)}"] if pure else []
    return f"Purity of the trusted samples, by the manifest of the training set: {', '.join(parts)}."


def percent(value: float | None, digits: int = 1) -> str:
    """``value`` in percent: ``5.0 %``; a dash where there is none."""
    if value is None:
        return "–"  # noqa: RUF001
    return f"{value:.{digits}f} %"


def change(value: float) -> str:
    """A difference of percentages with its sign: ``+0.1``, ``−96.2`` (a true minus)."""
    return f"{value:+.1f}".replace("-", "−")  # noqa: RUF001


def tied(text: str) -> str:
    """The text with its percent signs tied to their numbers, for lines that wrap."""
    return text.replace(" %", "\u00a0%")


def interval(rate: Interval) -> str:
    """``73.6 to 75.3``: the 95 % interval without the value."""
    return f"{rate.low:.1f} to {rate.high:.1f}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
