"""Easy data augmentation of captions: one small random edit of the words, without any word list.

Wei and Zou, EDA (EMNLP 2019), has four edits. Two are as published: swap two words, drop each word with probability
0.1. Two take their words from the caption itself instead of a thesaurus: a copy of one word is inserted anywhere (for
the insertion of a synonym), and a word is doubled in place (for the replacement by one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

SHARE = 0.1
"""Share of the words that one edit touches (alpha in the paper), at least one word."""
_LONGEST = 256  # words; no tokenizer of a CLIP reads further

Words = list[str]


def edit_captions(texts: Sequence[str], random: np.random.Generator) -> list[str]:
    """Each caption with one of the four edits, drawn anew at every call; never empty.

    A caption of one word, or in a script that does not part words by spaces, stays as it is.
    """
    return [_edit(text, random) for text in texts]


def _edit(text: str, random: np.random.Generator) -> str:
    operation = EDITS[int(random.integers(len(EDITS)))]
    words = text.split(maxsplit=_LONGEST)[:_LONGEST]
    return " ".join(operation(words, random)) if len(words) > 1 else text


def swap(words: Words, random: np.random.Generator) -> Words:
    """Two words at different places change places, once for each tenth of the words."""
    words = list(words)
    for _ in range(_count(words)):
        first, second = random.choice(len(words), size=2, replace=False)
        words[first], words[second] = words[second], words[first]
    return words


def delete(words: Words, random: np.random.Generator) -> Words:
    """Each word goes with probability 0.1; where all would, one stays."""
    kept = [word for word, chance in zip(words, random.random(len(words)), strict=True) if chance >= SHARE]
    return kept or [words[int(random.integers(len(words)))]]


def insert(words: Words, random: np.random.Generator) -> Words:
    """A copy of a word is put anywhere, once for each tenth of the words."""
    words = list(words)
    for _ in range(_count(words)):
        copied = words[int(random.integers(len(words)))]
        words.insert(int(random.integers(len(words) + 1)), copied)
    return words


def duplicate(words: Words, random: np.random.Generator) -> Words:
    """A word is said twice in its place, once for each tenth of the words."""
    words = list(words)
    for _ in range(_count(words)):
        place = int(random.integers(len(words)))
        words.insert(place, words[place])
    return words


def _count(words: Words) -> int:
    return max(1, int(SHARE * len(words)))


EDITS: tuple[Callable[[Words, np.random.Generator], Words], ...] = (swap, delete, insert, duplicate)
