"""What every repair of a CLIP keeps to: the caller's model, the seed, clear refusals, the last good weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from unpoison.api_clip import ClipPurifyOutcome
from unpoison.catalog import DEFENSES, NEEDS, Entry, find, resolve
from unpoison.clip_training import PairTrainingConfig
from unpoison.data.pairs import ImageTextPairs, open_pairs
from unpoison.errors import ModelError, NotEnoughDataError, UsageError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.runs import Run

QUICK: dict[str, Any] = {"batch_size": 12, "steps": 2, "check_every": 1, "learning_rate": 1e-3, "bound": 100.0}
REPAIRS = tuple(entry for entry in DEFENSES if {"suspicious CLIP", "clean pairs"} <= set(entry.needs))
repairs = pytest.mark.parametrize("entry", REPAIRS, ids=lambda entry: entry.name)
ways = pytest.mark.parametrize(
    ("entry", "more"),
    [pytest.param(entry, {}, id=entry.name) for entry in REPAIRS]
    + [pytest.param(find("par", REPAIRS), {"search_concepts": 8}, id="par-searching")],
)
HOSTILE = {
    "html": "<script>alert(1)</script> <b>a cat</b>",
    "emoji": "🐈‍⬛ 👩🏽‍🚀 \u202eback\u200b",
    "others": "猫 кошка قطة Katze",
    "long": "word " * 2000,
    "mark": "<|endoftext|> a dog <|startoftext|>",
    "braces": "{} {0} %s \\x00",
}


@pytest.fixture
def clip(small_folder: Path) -> TransformersCLIP:
    return load_clip(small_folder)


@pytest.fixture(scope="module")
def pairs() -> ImageTextPairs:
    return open_pairs("shapes:40:3")


def purify(entry: Entry, clip: Any, pairs: ImageTextPairs, seed: int = 0, **changes: Any) -> ClipPurifyOutcome:
    config: PairTrainingConfig = resolve(entry.config)(**(QUICK | changes))
    run = Run(accelerator=Accelerator(cpu=True), seed=seed)
    return resolve(entry.function)(clip, pairs, config=config, run=run)


def weights(clip: Any) -> dict[str, Tensor]:
    return dict(clip.module.state_dict())


def test_there_are_three_and_their_entries_are_complete() -> None:
    assert [entry.name for entry in REPAIRS] == ["par", "clean-clip", "fine-tuning"]
    for entry in REPAIRS:
        assert issubclass(resolve(entry.config), PairTrainingConfig)
        assert set(entry.needs) <= set(NEEDS)
        assert entry.protects


@repairs
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
def test_the_given_model_is_left_as_it_is(
    entry: Entry, half: bool, clip: TransformersCLIP, pairs: ImageTextPairs
) -> None:
    if half:
        clip.module.half()
    clip.module.train(half)
    next(clip.module.parameters()).requires_grad_(False)
    before, mode, fingerprint = hash_weights(weights(clip)), clip.module.training, clip.fingerprint
    asked = {name: value.requires_grad for name, value in clip.module.named_parameters()}
    random = torch.get_rng_state()
    captions = pairs.captions(range(len(pairs)))
    outcome = purify(entry, clip, pairs)
    # nobody's things were changed
    assert hash_weights(weights(clip)) == before
    assert clip.module.training == mode
    assert {name: value.requires_grad for name, value in clip.module.named_parameters()} == asked
    assert all(value.grad is None for value in clip.module.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert pairs.captions(range(len(pairs))) == captions
    # the result is another model under the same keys and types
    new = weights(outcome.clip)
    assert hash_weights(new) != before
    assert {name: (value.dtype, value.shape) for name, value in new.items()} == {
        name: (value.dtype, value.shape) for name, value in weights(clip).items()
    }
    assert {name: value.requires_grad for name, value in outcome.clip.module.named_parameters()} == asked
    # and what was done is on record
    result = outcome.purification
    assert (result.method, result.protects) == (entry.name, "both towers' weights")
    assert result.inputs["model"] == fingerprint
    assert result.inputs["torch"] == torch.__version__
    assert result.reason
    assert result.not_covered


@repairs
def test_the_seed_decides(entry: Entry, clip: TransformersCLIP, pairs: ImageTextPairs) -> None:
    first, again, other = (hash_weights(weights(purify(entry, clip, pairs, seed).clip)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@ways
def test_fp16_without_a_scale_is_refused(
    entry: Entry, more: dict[str, Any], clip: TransformersCLIP, pairs: ImageTextPairs
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = Run(accelerator=Accelerator(cpu=True, mixed_precision="fp16"))
        config = resolve(entry.config)(**(QUICK | more))
        with pytest.raises(UsageError, match="fp16 does not train on the device 'cpu'") as caught:
            resolve(entry.function)(clip, pairs, config=config, run=run)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "bf16" in caught.value.hint


@ways
@pytest.mark.parametrize("name", ["text_projection.weight", "visual_projection.weight"])
def test_weights_that_are_no_numbers_are_refused(
    name: str, entry: Entry, more: dict[str, Any], clip: TransformersCLIP, pairs: ImageTextPairs
) -> None:
    clip.module.get_parameter(name).data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=rf"1 tensors hold NaN.*'{name}'") as caught:
        purify(entry, clip, pairs, **more)
    assert "earlier checkpoint" in caught.value.hint


@ways
def test_towers_that_disagree_are_refused(
    entry: Entry, more: dict[str, Any], clip: TransformersCLIP, pairs: ImageTextPairs
) -> None:
    narrow: Any = clip.module
    narrow.text_projection = torch.nn.Linear(16, 5, bias=False)
    with pytest.raises(ModelError, match="images have 8 dimensions, texts 5"):
        purify(entry, clip, pairs, **more)


@repairs
def test_fewer_pairs_than_a_batch_make_it_smaller(entry: Entry, clip: TransformersCLIP, pairs: ImageTextPairs) -> None:
    outcome = purify(entry, clip, pairs, batch_size=2048)
    result = outcome.purification
    assert (result.batch_size, result.trained_pairs, result.held_out_pairs) == (32, 32, 8)
    assert any("The batch is 32 instead of 2048" in warning for warning in result.warnings)
    assert hash_weights(weights(outcome.clip)) != hash_weights(weights(clip))
    with pytest.raises(NotEnoughDataError, match="have 15, need at least 16") as caught:
        purify(entry, clip, pairs.select(range(15)))
    assert "more pairs" in caught.value.hint


@repairs
def test_a_training_that_diverges_keeps_the_last_good_weights(
    entry: Entry, clip: TransformersCLIP, pairs: ImageTextPairs
) -> None:
    outcome = purify(entry, clip, pairs, steps=4, check_every=2, learning_rate=1e30)
    result = outcome.purification
    assert not result.accepted
    assert f"{entry.name} diverged at step 1: loss nan" in result.reason
    assert "The weights of step 0 were kept." in result.reason
    assert (result.steps, result.planned_steps) == (0, 4)
    assert hash_weights(weights(outcome.clip)) == hash_weights(weights(clip))


@repairs
def test_captions_of_any_kind_are_trained_on(entry: Entry, clip: TransformersCLIP, pairs: ImageTextPairs) -> None:
    changed = dict(zip(pairs.ids[:24], [*HOSTILE.values()] * 4, strict=True))
    hostile = pairs.with_overlay(None, changed)
    result = purify(entry, clip, hostile).purification
    assert result.steps == 2
    # the world's captions are longer than the tokenizer's 24 bytes as well: equal ones count once
    texts = {text for texts in hostile.captions(range(len(hostile))) for text in texts}
    assert result.truncated_captions == sum(clip.truncated(sorted(texts))) > 1
    assert any(f"cuts off {result.truncated_captions} different captions" in line for line in result.warnings)
