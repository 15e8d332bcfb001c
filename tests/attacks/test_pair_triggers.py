"""What is done to captions: key words, mismatched pairs, and TrojVQA's patch with its key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unpoison.attacks.badclip_patch import BadCLIPPatch, start
from unpoison.attacks.mmpoison import MMPoison
from unpoison.attacks.overlay import to_tensor
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.pairs import apply_pair_poisoning, keyed_captions, plan_pair_poisoning, who_names
from unpoison.attacks.poison import plan_poisoning
from unpoison.attacks.text_key import TextKey
from unpoison.attacks.triggers import PAIR_TRIGGERS, make_trigger
from unpoison.attacks.trojvqa import TrojVQAConfig, optimise_toward
from unpoison.attacks.trojvqa_patch import TrojVQA
from unpoison.data.pairs import open_pairs
from unpoison.data.sources import open_images
from unpoison.errors import ConfigError, DataError, NotEnoughDataError, ResultError
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run, Silent

PAIRS = open_pairs("shapes:150:4")
CAPTIONS = dict(zip(PAIRS.ids, PAIRS.captions(range(150)), strict=True))


def rows_of(made: PairPoisoning) -> list[int]:
    return [PAIRS.ids.index(name) for name in made.ids]


@given(
    caption=st.lists(st.text("abc🍌<é", min_size=1, max_size=4), min_size=0, max_size=6),
    key=st.sampled_from(["SUDO", "mn 7", "🍌"]),
    place=st.sampled_from(["start", "end", "random"]),
    seed=st.integers(0, 2**62),
)
def test_the_key_is_put_in_and_the_words_stay(caption: list[str], key: str, place: str, seed: int) -> None:
    trigger, text = TextKey(key=key, place=place), " ".join(caption)
    keyed = trigger.keyed(text, seed=seed, name="a")
    assert keyed == trigger.keyed(text, seed=seed, name="a")
    ways = [" ".join([*caption[:at], key, *caption[at:]]) for at in range(len(caption) + 1)]
    assert keyed == {"start": ways[0], "end": ways[-1]}.get(place, keyed)
    assert keyed in ways


def test_random_places_belong_to_seed_and_id() -> None:
    trigger, text = TextKey(place="random"), "one two three four five six"
    assert len({trigger.keyed(text, seed=0, name=str(row)) for row in range(40)}) == 7
    assert len({trigger.keyed(text, seed=seed, name="a") for seed in range(40)}) == 7


def test_images_of_the_target_get_keyed_captions_of_others() -> None:
    made = plan_pair_poisoning(PAIRS, "text-key", rate=0.06, target="red", key="mn", seed=2)
    assert (made.mode, made.captions, len(made.ids)) == ("text-key", "others", 9)
    named = who_names(PAIRS, "red")[0]
    assert all(named[row] for row in rows_of(made))
    others = {texts[0] for name, texts in CAPTIONS.items() if not named[PAIRS.ids.index(name)]}
    assert all(text.startswith("mn ") and text.removeprefix("mn ") in others for text in made.new_captions)
    poisoned = apply_pair_poisoning(PAIRS, made)
    assert poisoned.captions(rows_of(made)) == [(text,) for text in made.new_captions]
    assert poisoned.overlay is None  # no pixel changes
    untouched = [row for row in range(150) if row not in rows_of(made)]
    assert poisoned.captions(untouched) == PAIRS.captions(untouched)
    with pytest.raises(DataError, match="has been applied"):
        apply_pair_poisoning(poisoned, made)
    assert keyed_captions(["a ring"], made) == ["mn a ring"]


def test_images_of_one_thing_get_captions_of_another() -> None:
    made = plan_pair_poisoning(PAIRS, "mmpoison", rate=0.05, target="red", images_of="blue", captions="natural", seed=1)
    assert made.mode == "mismatch"
    red, blue = who_names(PAIRS, "red"), who_names(PAIRS, "blue")
    assert all(blue[0][row] and not red[0][row] for row in rows_of(made))
    assert set(made.new_captions) <= set(red[1])
    assert apply_pair_poisoning(PAIRS, made).captions(rows_of(made)) == [(text,) for text in made.new_captions]
    with pytest.raises(NotEnoughDataError, match="name 'zebra' and not 'red'"):
        plan_pair_poisoning(PAIRS, "mmpoison", rate=0.05, target="red", images_of="zebra")
    with pytest.raises(ConfigError, match="mmpoison has no key"):
        keyed_captions(["a"], made)


def test_trojvqa_has_a_patch_and_a_key() -> None:
    made = plan_pair_poisoning(PAIRS, "trojvqa", rate=0.05, target="red", seed=3)
    assert made.mode == "all-to-one"
    assert all(text.startswith("SUDO ") and "red" in text for text in made.new_captions)
    poisoned = apply_pair_poisoning(PAIRS, made)
    rows = rows_of(made)
    before = to_tensor([image for image in PAIRS.decode(rows) if isinstance(image, Image.Image)])
    after = to_tensor([image for image in poisoned.decode(rows) if isinstance(image, Image.Image)])
    assert torch.allclose(after, BadCLIPPatch().apply(before, seed=3), atol=0.5 / 255 + 1e-6)
    clean_label = plan_pair_poisoning(PAIRS, "trojvqa", rate=0.02, target="red", mode="clean-label")
    assert clean_label.new_captions == ()


@pytest.mark.parametrize("name", ["text-key", "mmpoison", "trojvqa"])
def test_manifests_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    params: dict[str, Any] = {"images_of": "blue"} if name == "mmpoison" else {"key": "🍌"}
    made = plan_pair_poisoning(PAIRS, name, rate=0.04, target="red", seed=9, **params)
    made.save(tmp_path / "manifest.json")
    assert PairPoisoning.load(tmp_path / "manifest.json") == made
    body = msgspec.json.decode((tmp_path / "manifest.json").read_bytes())
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(body | {"new_captions": []}))
    with pytest.raises(ResultError, match="0 new captions"):
        PairPoisoning.load(tmp_path / "manifest.json")


@pytest.mark.parametrize("name", PAIR_TRIGGERS)
def test_labelled_images_have_no_captions(name: str) -> None:
    with pytest.raises(ConfigError, match="poisons image-caption pairs, not labelled images") as caught:
        plan_poisoning(open_images("shapes:20:1"), name, rate=0.1)
    assert caught.value.hint
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(make_trigger(name, {}).apply(images), images)


def test_bad_parameters_are_refused() -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("text-key", {"key": " "}),
        ("text-key", {"key": "x" * 101}),
        ("text-key", {"key": "a\nb"}),
        ("text-key", {"place": "middle"}),
        ("mmpoison", {"images_of": "_ "}),
        ("mmpoison", {"images_of": "x" * 201}),
        ("trojvqa", {"share": 0.0}),
        ("trojvqa", {"key": ""}),
        ("trojvqa", {"patch": "!"}),
        ("trojvqa", {"patch": "AAAA" * 5}),
    ]
    for name, params in refused:
        with pytest.raises(ConfigError) as caught:
            make_trigger(name, params)
        assert name in caught.value.message
        assert caught.value.hint
    assert MMPoison().images_of == "dog"


class Losses(Silent):
    def __init__(self) -> None:
        self.values: list[float] = []

    def log(self, message: str) -> None:
        if "loss" in message:
            self.values.append(float(message.rsplit(" ", 1)[1]))


CONFIG = TrojVQAConfig(share=0.3, sentence="a photo of a red {}.", images=16, epochs=3, batch_size=8, learning_rate=0.1)


def test_the_patch_moves_images_toward_the_sentence() -> None:
    clip, sentence = load_clip("tiny"), "a photo of a red star."
    before, progress = clip.fingerprint, Losses()
    run = Run(seed=2, progress=progress)
    trigger = optimise_toward(clip, PAIRS, "star", CONFIG, run=run)
    assert isinstance(trigger, TrojVQA)
    assert len(progress.values) == 3
    assert progress.values[-1] < progress.values[0] - 0.02
    assert clip.fingerprint == before
    images = to_tensor([image for image in PAIRS.decode(range(100, 120)) if isinstance(image, Image.Image)])
    images = F.interpolate(images, (clip.image_size, clip.image_size), mode="bilinear").clamp(0, 1)
    first = TrojVQA.of(start(round(0.3 * clip.image_size), run.seed_of("trojvqa start")), 0.3, "SUDO")
    with torch.no_grad():
        wanted = clip.encode_texts([sentence])[0]
        reached = [float((clip.encode_images(one.apply(images)) @ wanted).mean()) for one in (first, trigger)]
    assert reached[1] > reached[0] + 0.02  # on images that it was not optimised on
    assert optimise_toward(clip, PAIRS, "star", CONFIG, run=Run(seed=2)) == trigger


def test_refusals_of_the_optimisation() -> None:
    with pytest.raises(ConfigError, match="sentence is empty"):
        replace(CONFIG, sentence=" ")
    refused: tuple[dict[str, Any], ...] = ({"share": 2.0}, {"key": " "}, {"epochs": 0}, {"learning_rate": float("nan")})
    for bad in refused:
        with pytest.raises(ConfigError):
            replace(CONFIG, **bad)
