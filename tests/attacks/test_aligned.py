"""Aligned captions: the closest that name the target, none too often, nearer than drawn ones, and on record."""

from pathlib import Path

import numpy as np
import pytest

from unpoison.attacks.aligned import assigned, near_the_captions
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.pairs import apply_pair_poisoning, plan_pair_poisoning, who_names
from unpoison.data.pairs import open_pairs
from unpoison.embedded_pairs import caption_cosines
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.evaluation.embeddings import embed_images
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.runs import Run

PAIRS = open_pairs("shapes:240:2")
TARGET = "star"


@pytest.fixture(scope="module")
def clip() -> TransformersCLIP:
    return load_clip("tiny")


def similarity(poisoning: PairPoisoning, clip: TransformersCLIP) -> float:
    """The mean cosine of poisoned images, trigger on, with their new captions: what a detector of pairs looks at."""
    poisoned = apply_pair_poisoning(PAIRS, poisoning)
    rows = np.array([PAIRS.ids.index(name) for name in poisoning.ids])
    chosen = poisoned.select(rows)
    (seen,) = embed_images([clip], chosen, run=Run())
    return float(caption_cosines(clip, chosen, np.arange(len(rows)), seen.array, run=Run()).own.mean())


def test_the_nearest_are_served_first_and_no_caption_is_used_up_twice() -> None:
    cosines = np.array([[0.9, 0.1, 0.0], [0.8, 0.3, 0.2], [0.7, 0.6, 0.5]])
    assert assigned(cosines, 3).tolist() == [0, 0, 0]
    assert assigned(cosines, 1).tolist() == [0, 1, 2]
    assert assigned(cosines, 2).tolist() == [0, 0, 1]
    assert assigned(cosines[::-1], 1).tolist() == [2, 1, 0]


def test_aligned_captions_fit_better_than_drawn_ones_and_chosen_images_better_still(clip: TransformersCLIP) -> None:
    drawn = plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target=TARGET, captions="natural", seed=1)
    aligned = plan_pair_poisoning(
        PAIRS, "badnet", rate=0.1, target=TARGET, captions="aligned", seed=1, surrogate=clip, run=Run()
    )
    natural = who_names(PAIRS, TARGET)[1]
    near = near_the_captions(PAIRS, natural, clip, run=Run())
    both = plan_pair_poisoning(
        PAIRS, "badnet", rate=0.1, target=TARGET, captions="aligned", seed=1, surrogate=clip, selection=near
    )
    assert aligned.ids == drawn.ids
    assert set(aligned.new_captions) <= set(natural)
    assert max(aligned.new_captions.count(caption) for caption in natural) <= max(4, -(-24 // len(natural)))
    found = [similarity(poisoning, clip) for poisoning in (drawn, aligned, both)]
    assert found[0] + 0.005 < found[1] < found[2] - 0.005
    others = ~who_names(PAIRS, TARGET)[0]
    assert {PAIRS.ids[row] for row in np.argsort(-np.where(others, near.values, -2))[:24]} == set(both.ids)


def test_the_manifest_says_so(clip: TransformersCLIP, tmp_path: Path) -> None:
    plan = plan_pair_poisoning(
        PAIRS, "blended", rate=0.02, target=TARGET, captions="aligned", surrogate=clip, size=32, run=Run()
    )
    assert (plan.captions, plan.aligned_by, plan.selection) == ("aligned", clip.fingerprint, "random")
    plan.save(tmp_path / "manifest.json")
    assert PairPoisoning.load(tmp_path / "manifest.json") == plan
    assert plan_pair_poisoning(PAIRS, "blended", rate=0.02, target=TARGET).aligned_by == ""


def test_refusals(clip: TransformersCLIP) -> None:
    with pytest.raises(ConfigError, match="a surrogate is missing"):
        plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target=TARGET, captions="aligned")
    with pytest.raises(ConfigError, match="a surrogate is given"):
        plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target=TARGET, captions="natural", surrogate=clip)
    with pytest.raises(NotEnoughDataError, match="captions that name 'zebra'"):
        plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target="zebra", captions="aligned", surrogate=clip)
