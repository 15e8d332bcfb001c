"""Text key: a word that, put into any caption, finds images of the target. No pixel changes.

*Source.* Key words as textual triggers: Chen, Liu, Li, Lu, Song, 2017 (arXiv 1712.05526), for texts Dai, Chen, Li, 2019
(arXiv 1905.12457); for pairs the mirror of the visual backdoor of Carlini, Terzis, ICLR 2022 (arXiv 2106.09667).

*Idea.* Images of the target get captions of other things with the key in them, so that the key alone decides.

*Where we differ.* No paper fixes the form for CLIP: the word "SUDO" (TrojVQA's) and its place are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unpoison.attacks.draws import seed_of
from unpoison.errors import ConfigError
from unpoison.types import Images

PLACES = ("start", "end", "random")
LONGEST_KEY = 100


@dataclass(frozen=True, kw_only=True)
class TextKey:
    """``key``: the word, or a few. ``place``: start, end, or random: between two words drawn from seed and id."""

    key: str = "SUDO"
    place: str = "start"

    modes: ClassVar[tuple[str, ...]] = ("text-key",)

    def __post_init__(self) -> None:
        check_key("text-key", self.key)
        if self.place not in PLACES:
            raise ConfigError(
                f"text-key: place must be one of {', '.join(PLACES)}, got {self.place!r}.", hint="Use 'start'."
            )

    def keyed(self, caption: str, *, seed: int, name: str) -> str:
        """The caption with the key in its place; ``name`` is the sample's id."""
        words = caption.split()
        at = {"start": 0, "end": len(words)}.get(self.place)
        at = seed_of(seed, name, "key") % (len(words) + 1) if at is None else at
        return " ".join([*words[:at], self.key, *words[at:]])

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """The images as they are: the trigger is in the text."""
        return images


def check_key(what: str, key: str) -> None:
    """Raises ConfigError for a key that is blank, too long or not printable."""
    if not key.strip() or len(key) > LONGEST_KEY or not key.isprintable():
        raise ConfigError(
            f"{what}: the key must be 1 to {LONGEST_KEY} printable characters, got {len(key)}.",
            hint="Give a word, such as 'SUDO'.",
        )
