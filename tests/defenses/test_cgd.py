"""The pure parts of CGD's repair against references in NumPy, re-derived from its equation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unpoison.defenses.cgd import (
    CGDConfig,
    cgd_loss,
    label_log_likelihood,
    oversample,
    teacher_divergence,
)
from unpoison.defenses.repair import hold_out
from unpoison.detection.cgd import SeparationConfig
from unpoison.errors import ConfigError, NotEnoughDataError


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def naive_loss(f: np.ndarray, y: np.ndarray, z: np.ndarray, suspect: np.ndarray, c: CGDConfig) -> float:
    """mean_clean CE(f, y) + alpha tau^2 mean_suspect KL(softmax(z/tau) || softmax(f/tau))
    + beta mean_suspect log(p_f[y] + eps), sample by sample; "others": the KL without label y."""
    p = softmax(f)
    clean, unlearn, divergence = [], [], []
    for i in range(len(y)):
        if suspect[i]:
            counted = [k for k in range(f.shape[1]) if c.teacher == "all" or k != y[i]]
            student, teacher = (softmax(values[i : i + 1, counted] / c.tau)[0] for values in (f, z))
            divergence.append(sum(t * np.log(t / s) for s, t in zip(student, teacher, strict=True)))
            unlearn.append(np.log(p[i, y[i]] + c.epsilon))
        else:
            clean.append(-np.log(p[i, y[i]]))
    total = np.mean(clean) if clean else 0.0
    if divergence:
        total += c.alpha * c.tau**2 * np.mean(divergence) + c.beta * np.mean(unlearn)
    return float(total)


def batch(seed: int = 0, n: int = 12, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    f, z = random.normal(size=(n, classes)) * 3, random.normal(size=(n, classes)) * 5
    return f, random.integers(0, classes, n), z


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"alpha": 0.0},
        {"beta": 0.0},
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 0.7, "beta": 0.4, "tau": 2.0, "epsilon": 0.05},
        {"alpha": 0.7, "beta": 0.4, "teacher": "all"},
    ],
)
def test_the_loss_against_its_equation(share: float, constants: dict[str, Any]) -> None:
    f, y, z = batch()
    suspect = np.arange(len(y)) < share * len(y)
    config = CGDConfig(**constants)
    logits = torch.from_numpy(f).requires_grad_()
    loss = cgd_loss(logits, torch.from_numpy(y), torch.from_numpy(z), torch.from_numpy(suspect), config)
    assert float(loss.detach()) == pytest.approx(naive_loss(f, y, z, suspect, config), rel=1e-9, abs=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    if not share:  # no suspects: ordinary cross-entropy
        assert float(loss.detach()) == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits.detach(), torch.from_numpy(y)))
        )


def test_gradients_against_differences() -> None:
    f, y, z = batch(seed=1, n=4, classes=3)
    suspect = np.array([True, False, True, False])
    config = CGDConfig(alpha=0.3, beta=0.5)
    logits = torch.from_numpy(f).requires_grad_()
    cgd_loss(logits, torch.from_numpy(y), torch.from_numpy(z), torch.from_numpy(suspect), config).backward()
    assert logits.grad is not None
    for i, k in np.ndindex(f.shape):
        step = np.zeros_like(f)
        step[i, k] = 1e-6
        slope = (naive_loss(f + step, y, z, suspect, config) - naive_loss(f - step, y, z, suspect, config)) / 2e-6
        assert float(logits.grad[i, k]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_labels_that_are_sure_have_a_slope_only_where_it_is_insisted() -> None:
    labels, suspect = torch.tensor([1, 0]), torch.tensor([True, True])
    config = CGDConfig(alpha=0.0, insist=0.5)
    slopes = []
    for insist in (False, True):
        logits = torch.tensor([[0.0, 60.0, 1.0], [60.0, 3.0, 0.0]], requires_grad=True)
        cgd_loss(logits, labels, torch.zeros(2, 3), suspect, config, insist=insist).backward()
        assert logits.grad is not None
        slopes.append(logits.grad[[0, 1], labels].tolist())
    assert slopes[0] == [0.0, 0.0]
    assert slopes[1] == pytest.approx([0.25, 0.25])


def test_clips_opinion_among_the_others_leaves_the_given_label_to_the_unlearning() -> None:
    f, y, z = batch(seed=3)
    labels, suspect = torch.from_numpy(y), torch.ones(len(y), dtype=torch.bool)
    slopes = {}
    for teacher in ("others", "all"):
        logits = torch.from_numpy(f).requires_grad_()
        cgd_loss(logits, labels, torch.from_numpy(z), suspect, CGDConfig(beta=0.0, teacher=teacher)).backward()
        assert logits.grad is not None
        slopes[teacher] = logits.grad.gather(1, labels[:, None])
    assert not slopes["others"].any()
    assert slopes["all"].any()


@pytest.mark.parametrize("classes", [1, 2])
def test_two_classes_or_one_have_no_others_to_tell_apart(classes: int) -> None:
    logits = torch.randn(4, classes, dtype=torch.float64)
    labels, suspect = torch.tensor([0, 1, 1, 0]) % classes, torch.ones(4, dtype=torch.bool)
    assert float(cgd_loss(logits, labels, -logits, suspect, CGDConfig(beta=0.0))) == 0.0


def test_unlearning_lowers_the_given_label() -> None:
    f, y, _ = batch(seed=2)
    labels = torch.from_numpy(y)
    logits = torch.from_numpy(f).requires_grad_()
    label_log_likelihood(logits, labels, 1e-6).backward()
    assert logits.grad is not None
    with torch.no_grad():
        before = logits.softmax(1).gather(1, labels[:, None])
        after = (logits - 0.5 * logits.grad).softmax(1).gather(1, labels[:, None])
    assert (after < before).all()


def test_unlearning_is_bounded_below() -> None:
    """eps keeps the gradient ascent from running away once the label is gone."""
    gone = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    loss = label_log_likelihood(gone, torch.tensor([0]), 1e-6)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(1e-6))
    assert gone.grad is not None
    assert gone.grad.abs().max() < 1e-6


def test_divergence_is_zero_only_for_equal_opinions_up_to_a_shift() -> None:
    f, _, z = batch(seed=3)
    logits, teacher = torch.from_numpy(f), torch.from_numpy(z)
    assert float(teacher_divergence(logits, logits + 4, 3.0)) == pytest.approx(0, abs=1e-12)
    assert float(teacher_divergence(logits, teacher, 3.0)) > 0.01
    logits.requires_grad_()
    teacher_divergence(logits, teacher, 3.0).backward()
    assert logits.grad is not None
    moved = (logits - 1.0 * logits.grad).detach()
    assert teacher_divergence(moved, teacher, 3.0) < teacher_divergence(logits, teacher, 3.0)


def test_cosines_as_logits_are_a_faint_teacher() -> None:
    """With raw cosines the largest probability at C = 10 and tau = 1 is about 0.103: why the logit scale matters."""
    cosines = torch.full((1, 10), 0.2)
    cosines[0, 0] = 0.25
    assert float((cosines).softmax(1).max()) == pytest.approx(0.1047, abs=1e-3)
    assert float((100 * cosines).softmax(1).max()) > 0.9


SETS = st.lists(st.integers(0, 4), min_size=1, max_size=80)


@given(labels=SETS, share=st.floats(0.01, 0.99), seed=st.integers(0, 5), data=st.data())
@settings(max_examples=80, deadline=None)
def test_held_out_samples(labels: list[int], share: float, seed: int, data: st.DataObject) -> None:
    given_labels = np.array(labels, dtype=np.int64)
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, len(labels) - 1), min_size=1))), dtype=np.int64)
    counts = {label: int((given_labels[rows] == label).sum()) for label in set(given_labels[rows].tolist())}
    expected = {label: min(round(share * count), count - 1) for label, count in counts.items()}
    generator = torch.Generator().manual_seed(seed)
    if not any(expected.values()):
        with pytest.raises(NotEnoughDataError, match="held out"):
            hold_out(rows, given_labels, share, generator)
        return
    kept, held = hold_out(rows, given_labels, share, generator)
    assert sorted([*kept.tolist(), *held.tolist()]) == rows.tolist()
    for label, count in expected.items():
        assert (given_labels[held] == label).sum() == count
        assert (given_labels[kept] == label).any()
    again = hold_out(rows, given_labels, share, torch.Generator().manual_seed(seed))
    assert (again[0].tolist(), again[1].tolist()) == (kept.tolist(), held.tolist())


def test_nothing_clean_nothing_held_out() -> None:
    with pytest.raises(NotEnoughDataError, match="have 0, need at least 1"):
        hold_out(np.zeros(0, dtype=np.int64), np.zeros(5, dtype=np.int64), 0.5, torch.Generator())


@given(labels=SETS, seed=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_oversampling_levels_the_classes(labels: list[int], seed: int) -> None:
    given_labels = np.array(labels, dtype=np.int64)
    rows = np.arange(0, len(labels), 2)
    drawn = oversample(rows, given_labels, torch.Generator().manual_seed(seed))
    _, before = np.unique(given_labels[rows], return_counts=True)
    _, after = np.unique(given_labels[drawn], return_counts=True)
    assert (after == before.max()).all()
    assert set(drawn.tolist()) == set(rows.tolist())
    for label in np.unique(given_labels[rows]):  # nobody is repeated twice more than another
        _, repeats = np.unique(drawn[given_labels[drawn] == label], return_counts=True)
        assert repeats.max() - repeats.min() <= 1


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        (CGDConfig, {"steps": 0}, "steps"),
        (CGDConfig, {"learning_rate": -1.0}, "learning_rate"),
        (CGDConfig, {"held_out": 1.0}, "held_out"),
        (CGDConfig, {"sigma1": 0.1, "sigma2": 0.2}, "sigma2"),
        (CGDConfig, {"sigma1": 1.0}, "sigma1"),
        (CGDConfig, {"tau": 0.0}, "tau"),
        (SeparationConfig, {"scorers": 0}, "scorers"),
        (SeparationConfig, {"clip_logit_scale": 0.0}, "clip_logit_scale"),
    ],
)
def test_constants_out_of_range_are_refused(kind: type, change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        kind(**change)
    assert caught.value.hint


def test_ranks_within_something_else_are_refused() -> None:
    config = object.__new__(SeparationConfig)  # the type check of the test run would come first
    object.__setattr__(config, "rank_within", "label")
    with pytest.raises(ConfigError, match="'dataset' or 'class', got 'label'"):
        config.__post_init__()


def test_the_published_setting() -> None:
    config = CGDConfig.as_published(samples=50_000)
    assert (config.separation.clip_logit_scale, config.regions) == (1.0, "published")
    assert (config.momentum, config.schedule, config.steps) == (0.0, "constant", 1950)
    assert CGDConfig.as_published(samples=10**6).steps == 2000
    assert CGDConfig.as_published(samples=10).steps == 10
