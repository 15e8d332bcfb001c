"""mmPoison: images of one thing under captions of another. No pixel changes, and there is no trigger.

*Paper.* Yang, He, Li, Backes, Humbert, Berrang, Zhang, "Data Poisoning Attacks Against Multimodal Encoders", ICML 2023
(arXiv 2209.15266), attack II: texts of one class find images of another. What it did shows in retrieval alone.

*Idea.* Captions of the target (class A) get images of class B: pairs whose captions name B and not the target take a
natural caption of the target.

*Where we differ.* The rate is a share of all pairs; images of B that were not drawn stay under their own captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from unpoison.errors import ConfigError
from unpoison.types import Images


@dataclass(frozen=True, kw_only=True)
class MMPoison:
    """``images_of``: class B, the word or words that captions name it by."""

    images_of: str = "dog"

    modes: ClassVar[tuple[str, ...]] = ("mismatch",)

    def __post_init__(self) -> None:
        if not set(self.images_of) - set("_ ") or len(self.images_of) > 200:
            raise ConfigError(
                f"mmpoison: images_of must be a text of 1 to 200 characters, got {len(self.images_of)}.",
                hint="Give a word or a few, such as 'dog'.",
            )

    def apply(self, images: Images, *, seed: int = 0, ids: Sequence[str] | None = None) -> Images:
        """The images as they are: only their captions change."""
        return images
