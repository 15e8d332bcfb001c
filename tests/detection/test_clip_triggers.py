"""The search for a trigger on the tiny CLIP, as it is and with a shortcut that is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unpoison.data.pairs import open_pairs
from unpoison.detection import clip_triggers, confirmed_search
from unpoison.detection.clip_triggers import ConceptSearchConfig, find_concepts, search_concepts
from unpoison.detection.inversion import InversionConfig, InvertedTrigger
from unpoison.detection.trigger_search import TriggerSearch, TriggerSearchConfig, judge_triggers, search_triggers
from unpoison.errors import ConfigError, NotEnoughDataError
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run

QUICK = ConceptSearchConfig(
    concepts=8,
    images=160,
    captions=300,
    search=TriggerSearchConfig(inversion=InversionConfig(steps=40, batch_size=16)),
)


@pytest.fixture(scope="module")
def clip() -> Any:
    return load_clip("tiny")


class Shortcut:
    """A CLIP for which a corner of 4 x 4 pixels that is redder than it is green makes any image say ``text``."""

    def __init__(self, clip: Any, text: str) -> None:
        self.clip, self.text = clip, text
        with torch.no_grad():
            self.target = clip.encode_texts([text])[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.clip, name)

    def copy(self) -> Shortcut:
        return Shortcut(self.clip.copy(), self.text)

    def encode_images(self, images: Tensor) -> Tensor:
        corner = images[:, :, :4, :4].mean(dim=(2, 3))
        amount = torch.sigmoid(20 * (corner[:, 0] - corner[:, 1] - 0.2))[:, None]
        return F.normalize((1 - amount) * self.clip.encode_images(images) + amount * self.target, dim=1)


def test_a_shortcut_is_found_and_named_and_a_clean_model_is_not_suspected(clip: Any) -> None:
    pairs = open_pairs("shapes:400:5")
    text = pairs.captions([7])[0][0]
    before = clip.fingerprint
    planted: Any = Shortcut(clip, text)
    search, captions = search_concepts(planted, pairs, QUICK, run=Run())
    assert clip.fingerprint == before
    assert len(search.suspects) == 1
    with torch.no_grad():
        cosines = clip.encode_texts(list(captions)) @ clip.encode_texts([text])[0]
    assert int(cosines.argmax()) == search.suspects[0]  # the concept that the text belongs to
    found = search.trigger_of(search.suspects[0]).pattern.square()
    assert float(found[:, :4, :4].sum() / found.sum()) > 5 * 4 * 4 / 32 / 32  # far more than the corner's share
    plain, _ = search_concepts(clip, pairs, QUICK, run=Run())
    assert plain.suspects == ()


@pytest.mark.parametrize(("second", "suspected"), [(0.03, (0,)), (0.055, ()), (0.08, ())])
def test_what_is_suspected_is_searched_for_again_on_other_images(
    second: float, suspected: tuple[int, ...], clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    steps: list[str] = []

    def search(
        logits: Any, images: Tensor, names: Any, config: TriggerSearchConfig, *, run: Run, targets: Any = None,
        step: str = "trigger",
    ) -> TriggerSearch:  # fmt: skip
        steps.append(step)
        assert targets == (list(range(8)) if len(seen) == 1 else None)  # the same concepts are searched again
        sizes = [0.04 if not seen else second, 0.05, 0.052, 0.054, 0.056, 0.058, 0.06, 0.07]
        seen.append(images)
        return judge_triggers([planted_trigger(target, size) for target, size in enumerate(sizes)], names, config)

    for module in (clip_triggers, confirmed_search):
        monkeypatch.setattr(module, "search_triggers", search)
    found, _ = search_concepts(clip, open_pairs("shapes:400:5"), QUICK, run=Run())
    first, again = seen
    assert len(set(steps)) == 2  # each search keeps its own
    assert len(first) == len(again) == QUICK.images
    assert not (first[:, None].flatten(2) == again[None].flatten(2)).all(dim=2).any()
    assert found.suspects == suspected
    assert found.trigger_of(0).size == pytest.approx((0.04 * second) ** 0.5)
    search_concepts(clip, open_pairs("shapes:400:5"), replace(QUICK, confirm=False), run=Run())
    assert len(seen) == 3


def test_more_concepts_than_finalists_are_searched_again_as_they_are(
    clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    anything = TriggerSearchConfig(
        finalists=4, first_steps=1, ratio=1.0, index_apart=0.0, success=0.0,
        inversion=InversionConfig(steps=2, batch_size=8),
    )  # fmt: skip
    searches: list[TriggerSearch] = []

    def search(*given: Any, **more: Any) -> TriggerSearch:
        searches.append(search_triggers(*given, **more))
        return searches[-1]

    monkeypatch.setattr(confirmed_search, "search_triggers", search)
    config = replace(QUICK, concepts=24, search=anything)
    found, captions = search_concepts(clip, open_pairs("shapes:400:5"), config, run=Run())
    first, again = searches
    assert len(captions) == 24
    assert [entry.target for entry in again.triggers] == [entry.target for entry in first.triggers]
    assert [entry.target for entry in found.triggers] == [entry.target for entry in first.triggers]


def planted_trigger(target: int, size: float) -> InvertedTrigger:
    nothing = torch.zeros(3, 1, 1)
    return InvertedTrigger(form="additive", target=target, mask=nothing[:1], pattern=nothing, size=size, success=90.0)


def test_concepts_are_clusters() -> None:
    centers = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    which = torch.arange(60) % 3
    noise = 0.05 * torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
    embedded = F.normalize(centers[which] + noise, dim=1)
    found, captions = find_concepts(embedded.numpy(), [f"{int(kind)}" for kind in which], 3, run=Run())
    assert sorted(captions) == ["0", "1", "2"]
    for center, caption in zip(found, captions, strict=True):
        assert float(center @ centers[int(caption)]) > 0.99


def test_what_is_refused(clip: Any) -> None:
    with pytest.raises(NotEnoughDataError, match="images for inversion"):
        search_concepts(clip, open_pairs("shapes:9:5"), QUICK, run=Run())
    many = replace(QUICK, concepts=90, captions=90)
    with pytest.raises(NotEnoughDataError, match="different captions"):
        search_concepts(clip, open_pairs("shapes:100:5"), many, run=Run())
    with pytest.raises(ConfigError):
        ConceptSearchConfig(concepts=7)
