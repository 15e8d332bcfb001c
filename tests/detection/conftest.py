"""Ranks made up in NumPy: clean sets whose two axes agree about what is hard, and poison in the corner."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from unpoison.detection.cgd import CLIP_AXIS, EARLY_AXIS, JOINT_AXIS
from unpoison.detection.ranks import rank_normalise
from unpoison.results import SampleScores


def make_scores(clip_loss: np.ndarray, early_loss: np.ndarray, labels: np.ndarray, classes: int) -> SampleScores:
    """Losses to scores as ``score_with_cgd`` does it: high ``clip_rank`` = rejected, high ``early_rank`` = early."""
    clip, early = rank_normalise(clip_loss), rank_normalise(-early_loss)
    return SampleScores(
        method="cgd",
        ids=[f"s{row}" for row in range(len(labels))],
        labels=labels,
        class_names=tuple(f"class {label}" for label in range(classes)),
        axes={CLIP_AXIS: clip, EARLY_AXIS: early, JOINT_AXIS: np.minimum(clip, early)},
        primary=JOINT_AXIS,
        details={"clip_agreement": 80.0},
    )


def losses(
    random: np.random.Generator, labels: np.ndarray, *, agreement: float, spread: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Losses of clean samples: correlation ``agreement`` through a common hardness, and a level of each class."""
    own, common = np.sqrt(1 - agreement), np.sqrt(agreement)
    hardness = common * random.normal(size=len(labels))
    level = spread * random.normal(size=(2, labels.max() + 1))
    clip = hardness + own * random.normal(size=len(labels)) + level[0, labels]
    early = hardness + own * random.normal(size=len(labels)) + level[1, labels]
    return clip, early


def poison(
    random: np.random.Generator, clip: np.ndarray, early: np.ndarray, labels: np.ndarray, target: int, rate: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Relabel a share of the set to ``target``: CLIP rejects the label, the trigger is learnt first.

    Returns (clip, early, labels, poisoned rows as a mask). The overlap with clean samples is that of a real set:
    some triggered images look to CLIP like the target, some clean ones are learnt as early.
    """
    mask = np.zeros(len(labels), dtype=bool)
    outside = np.flatnonzero(labels != target)
    mask[random.choice(outside, round(rate * len(labels)), replace=False)] = True
    clip, early, labels = clip.copy(), early.copy(), labels.copy()
    clip[mask] = random.normal(2.5, 0.7, mask.sum())
    early[mask] = random.normal(-3.0, 0.6, mask.sum())
    labels[mask] = target
    return clip, early, labels, mask


KINDS = ("plain", "one class CLIP cannot name", "label noise", "uneven classes", "weakly correlated", "an easy class")


def clean_set(kind: str, seed: int) -> SampleScores:
    random = np.random.default_rng([seed, KINDS.index(kind)])
    classes = int(random.choice([2, 5, 10, 40]))
    n = int(random.choice([600, 2000, 5000]))
    shares = random.dirichlet(np.full(classes, 0.5)) if kind == "uneven classes" else np.full(classes, 1 / classes)
    labels = random.choice(classes, size=n, p=shares)
    agreement = 0.15 if kind == "weakly correlated" else float(random.uniform(0.4, 0.8))
    clip, early = losses(random, labels, agreement=agreement)
    if kind == "one class CLIP cannot name":
        clip[labels == 0] += 6
    if kind == "an easy class":
        early[labels == 0] -= 3
    if kind == "label noise":  # wrong labels are rejected by CLIP and learnt last
        wrong = random.random(n) < random.uniform(0.02, 0.2)
        labels[wrong] = random.integers(0, classes, int(wrong.sum()))
        clip[wrong] += 4
        early[wrong] += 3
    return make_scores(clip, early, labels, classes)


def poisoned_set(rate: float, seed: int, *, targets: tuple[int, ...] = (3,)) -> tuple[SampleScores, np.ndarray]:
    random = np.random.default_rng([seed, 99])
    labels = random.integers(0, 10, 5000)
    clip, early = losses(random, labels, agreement=0.6)
    poisoned = np.zeros(len(labels), dtype=bool)
    for target in targets:
        clip, early, labels, mask = poison(random, clip, early, labels, target, rate)
        poisoned |= mask
    return make_scores(clip, early, labels, 10), poisoned


@pytest.fixture(scope="session")
def planted() -> SimpleNamespace:
    """The functions above, for tests that cannot import from each other."""
    functions = (make_scores, losses, poison, clean_set, poisoned_set)
    return SimpleNamespace(**{function.__name__: function for function in functions})
