"""What the catalog says of each attack, detector and defense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["attack", "detector", "defense"]
NEEDS = (
    "clean labelled shots",
    "clean pairs",
    "class names",
    "image-caption pairs",
    "labelled set",
    "poisoned training set",
    "reference CLIP",
    "suspicious CLIP",
    "suspicious pairs",
    "victim model",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method. ``needs`` are words of ``NEEDS``; ``protects`` says what is safe to use afterwards (defenses)."""

    name: str
    kind: Kind
    idea: str
    paper: str
    link: str
    needs: tuple[str, ...]
    protects: str = ""
    config: str
    function: str
