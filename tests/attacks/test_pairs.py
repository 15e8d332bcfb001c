"""Planning, saving and applying poisonings of image-caption pairs."""

from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unpoison.attacks.badnet import BadNet
from unpoison.attacks.overlay import to_tensor
from unpoison.attacks.pair_manifest import PairPoisoning, Squashed
from unpoison.attacks.pairs import apply_pair_poisoning, plan_pair_poisoning, trigger_images, trigger_pairs
from unpoison.attacks.prompts import TEMPLATES
from unpoison.attacks.triggers import make_trigger
from unpoison.data.captions import captions_dataset
from unpoison.data.pairs import ImageTextPairs
from unpoison.errors import (
    ConfigError,
    DataError,
    NotEnoughDataError,
    ResultError,
    SchemaVersionError,
    UnknownMethodError,
    UsageError,
)
from unpoison.results import SkippedRow

BANANAS = ("A ripe banana on a plate.", "Two BANANAS.", "<b>banana</b> 🍌 " + "very " * 2000 + "ripe")


def make_pairs(count: int = 40, *, bad: tuple[int, ...] = (), sizes: tuple[int, ...] = (16,)) -> ImageTextPairs:
    """Random pictures; every fourth has a caption of a banana beside another one, rows in ``bad`` do not decode."""
    from io import BytesIO

    random, cells, captions = np.random.default_rng(0), [], []
    for row in range(count):
        size = sizes[row % len(sizes)]
        buffer = BytesIO()
        Image.fromarray(random.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue()[:40] if row in bad else buffer.getvalue(), "path": None})
        captions.append((f"something {row}", BANANAS[row // 4 % 3]) if row % 4 == 0 else (f"bananarama {row}",))
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return ImageTextPairs(
        name="fruit",
        dataset=datasets.Dataset.from_dict({"image": cells}, features=features),
        ids=[f"s{row}" for row in range(count)],
        texts=captions_dataset(iter(captions)),
    )


PAIRS = make_pairs()


def arrays(pairs: ImageTextPairs) -> list[np.ndarray]:
    return [np.asarray(image) for image in pairs.decode(range(len(pairs))) if isinstance(image, Image.Image)]


def test_the_templates_are_eighty_sentences() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES) == 80
    assert all(template.count("{}") == 1 for template in TEMPLATES)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rate=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["all-to-one", "clean-label"]),
    captions=st.sampled_from(["templates", "natural"]),
)
def test_the_plan_keeps_its_books(rate: float, seed: int, mode: str, captions: str) -> None:
    need, eligible = max(1, round(rate * 40)), 30 if mode == "all-to-one" else 10

    def plan() -> PairPoisoning:
        return plan_pair_poisoning(PAIRS, "badnet", rate=rate, target="banana", seed=seed, mode=mode, captions=captions)

    if need > eligible:
        with pytest.raises(NotEnoughDataError) as caught:
            plan()
        assert (caught.value.have, caught.value.need) == (eligible, need)
        return
    made = plan()
    assert made == plan()
    assert len(set(made.ids)) == len(made.ids) == need
    assert all((int(name[1:]) % 4 == 0) == (mode == "clean-label") for name in made.ids)
    pool = BANANAS if captions == "natural" else [template.replace("{}", "banana") for template in TEMPLATES]
    assert set(made.new_captions) <= set(pool)
    assert len(made.new_captions) == (need if mode == "all-to-one" else 0)
    assert len(set(made.new_captions)) == min(len(made.new_captions), len(pool))
    poisoned = apply_pair_poisoning(PAIRS, made)
    new = dict(zip(made.ids, made.new_captions, strict=False))
    for name, before, after in zip(PAIRS.ids, PAIRS.captions(range(40)), poisoned.captions(range(40)), strict=True):
        assert after == ((new[name],) if name in new else before)


def test_the_trigger_is_on_the_poisoned_images_and_no_other() -> None:
    pairs = make_pairs(bad=(5,), sizes=(16, 20))
    made = plan_pair_poisoning(pairs, "badnet-rand", rate=0.4, target="banana", seed=3, resample=True)
    before, after = pairs.decode(range(40)), apply_pair_poisoning(pairs, made).decode(range(40))
    trigger = make_trigger("badnet-rand", {"resample": True})
    for name, old, new in zip(pairs.ids, before, after, strict=True):
        if name == "s5":
            assert isinstance(new, SkippedRow)
            continue
        assert isinstance(old, Image.Image)
        expected = np.asarray(old)
        if name in made.ids:
            turned = trigger.apply(to_tensor([old]), seed=3, ids=[name])[0].permute(1, 2, 0).numpy()
            expected = np.rint(turned * 255)
            assert not np.array_equal(expected, np.asarray(old))
        assert np.array_equal(np.asarray(new), expected)
    assert apply_pair_poisoning(pairs, made).raw(range(40)) == pairs.raw(range(40))


def test_images_are_squashed_before_the_trigger() -> None:
    pairs = make_pairs(8, sizes=(64, 32))
    made = plan_pair_poisoning(pairs, "badnet", rate=0.5, target="banana", size=32)
    for name, image in zip(pairs.ids, arrays(apply_pair_poisoning(pairs, made)), strict=True):
        if name in made.ids:
            assert image.shape == (32, 32, 3)
            assert np.array_equal(image[-3:, -3:, 0], [[0, 0, 255], [0, 255, 0], [255, 0, 255]])
        else:
            assert image.shape in ((64, 68, 3), (32, 36, 3))
    assert made.make_trigger() == Squashed(trigger=BadNet(), size=32)


def test_squashing_keeps_the_picture() -> None:
    ramp = torch.linspace(0, 1, 96).expand(2, 3, 64, 96)
    small = Squashed(trigger=make_trigger("blended-text", {"alpha": 1e-6}), size=32).apply(ramp)
    assert small.shape == (2, 3, 32, 32)
    assert torch.allclose(small[0, 0, 5, 2:-2], torch.linspace(0, 1, 96).view(32, 3).mean(1)[2:-2], atol=2e-3)
    assert 0 <= float(small.min()) <= float(small.max()) <= 1


def test_natural_captions_may_come_from_other_pairs() -> None:
    silent = PAIRS.select([row for row in range(40) if row % 4])
    with pytest.raises(NotEnoughDataError, match="captions that name 'banana'"):
        plan_pair_poisoning(silent, "badnet", rate=0.1, target="banana", captions="natural")
    made = plan_pair_poisoning(silent, "badnet", rate=0.1, target="banana", captions="natural", natural_from=PAIRS)
    assert set(made.new_captions) <= set(BANANAS)


def test_manifests_come_back_as_they_were(tmp_path: Path) -> None:
    triggers: dict[str, dict[str, Any]] = {"badnet-stripes": {"resample": True}, "wanet": {"k": 4}, "badclip": {}}
    for trigger, params in triggers.items():
        made = plan_pair_poisoning(
            PAIRS, trigger, rate=0.2, target="banana", captions="natural", seed=9, size=224, **params
        )
        made.save(tmp_path / "manifest.json")
        assert PairPoisoning.load(tmp_path / "manifest.json") == made
        body = msgspec.json.decode((tmp_path / "manifest.json").read_bytes())
        assert (body["schema"], body["schema_version"]) == ("unpoison/pair-poisoning", 1)


def test_bad_manifests_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target="banana").save(path)
    good = msgspec.json.decode(path.read_bytes())

    def load(**changes: object) -> PairPoisoning:
        path.write_bytes(msgspec.json.encode(good | changes))
        return PairPoisoning.load(path)

    assert load() == load(unknown_key_of_a_later_minor_version=1)
    with pytest.raises(SchemaVersionError, match="schema version 2, this version reads 1"):
        load(schema_version=2)
    wrong: list[dict[str, object]] = [
        {"schema": "unpoison/poisoning"},
        {"ids": "s1"},
        {"ids": ["s1", "s2"]},
        {"ids": ["s1"] * 4},
        {"new_captions": ["a", " ", "b", "c"]},
        {"mode": "clean-label"},
    ]
    for changes in wrong:
        with pytest.raises(ResultError):
            load(**changes)
    out_of_range: list[dict[str, object]] = [
        {"mode": "all-to-all", "new_captions": []},
        {"captions": "songs"},
        {"rate": 0.0},
        {"size": 10**9},
        {"seed": -1},
        {"target_name": "  "},
        {"config": {"code": "import os"}},
        {"trigger": "clean-image", "config": {}},
    ]
    for changes in out_of_range:
        with pytest.raises(ConfigError):
            load(**changes)
    with pytest.raises(UnknownMethodError):
        load(trigger="badmat")
    for content in (b"", b"[1, 2]", b"\x80\x04pickle", b"7"):
        path.write_bytes(content)
        with pytest.raises(ResultError):
            PairPoisoning.load(path)


def test_refusals() -> None:
    for rate in (0.0, 1.01, float("nan")):
        with pytest.raises(ConfigError, match=r"rate must be in \(0, 1\]"):
            plan_pair_poisoning(PAIRS, "badnet", rate=rate, target="banana")
    for target in ("", "   ", "_ _", "x" * 201):
        with pytest.raises(ConfigError, match="target"):
            plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target=target)
    with pytest.raises(ConfigError, match="captions must be one of templates, natural"):
        plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target="banana", captions="poems")
    with pytest.raises(ConfigError, match="no mode 'all-to-one'"):
        plan_pair_poisoning(PAIRS, "clean-image", rate=0.1, target="banana")
    with pytest.raises(ConfigError, match="seed"):
        plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target="banana", seed=-1)
    with pytest.raises(ConfigError, match="size"):
        plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target="banana", size=0)
    with pytest.raises(ConfigError, match="templates"):
        plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target="banana", templates=["a banana"])
    with pytest.raises(ConfigError, match="no parameter 'resample'"):
        plan_pair_poisoning(PAIRS, "blended-text", rate=0.1, target="banana", resample=True)


def test_applying_to_other_pairs_or_twice_is_refused() -> None:
    for mode in ("all-to-one", "clean-label"):
        made = plan_pair_poisoning(PAIRS, "badnet", rate=0.2, target="banana", mode=mode)
        poisoned = apply_pair_poisoning(PAIRS, made)
        with pytest.raises(DataError, match="has been applied to fruit"):
            apply_pair_poisoning(poisoned, made)
        with pytest.raises(DataError, match="ids of the poisoning are not in fruit"):
            apply_pair_poisoning(PAIRS.select([1, 2, 3]), made)


def test_captions_of_strangers_stay_what_they_are() -> None:
    made = plan_pair_poisoning(PAIRS, "badnet", rate=0.1, target="<b>{0}</b> \U0001f34c {}")
    assert all("<b>{0}</b> \U0001f34c {}" in caption for caption in made.new_captions)
    assert apply_pair_poisoning(PAIRS, made).captions([PAIRS.ids.index(made.ids[0])]) == [(made.new_captions[0],)]


def test_test_images_of_the_target_are_left_out() -> None:
    made = plan_pair_poisoning(PAIRS, "blended", rate=0.1, target="banana", size=16, resample=True)
    triggered, rows = trigger_pairs(PAIRS, made)
    assert rows.tolist() == [row for row in range(40) if row % 4]
    assert triggered.captions(range(30)) == PAIRS.captions(rows)
    batch = to_tensor([image for image in PAIRS.decode(rows) if isinstance(image, Image.Image)])
    expected = trigger_images(batch, made, ids=triggered.ids)
    assert np.allclose(np.stack(arrays(triggered)), expected.permute(0, 2, 3, 1) * 255, atol=0.51)
    with pytest.raises(UsageError, match="blended: expected 30 ids"):
        trigger_images(batch, made, ids=None)
    with pytest.raises(NotEnoughDataError):
        trigger_pairs(PAIRS.select([0, 4]), made)
