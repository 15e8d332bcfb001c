"""Poisonings of several parts: disjoint samples, to disk and back, applied, written and evaluated part by part."""

from io import BytesIO
from pathlib import Path

import datasets
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.overlay import to_tensor
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.parts import (
    Part,
    PoisoningParts,
    apply_pair_parts,
    apply_parts,
    load_labelled,
    load_manifest,
    plan_pair_parts,
    plan_parts,
    write_poisoned_parts,
)
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.data.pairs import ImageTextPairs, open_pairs
from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import (
    ConfigError,
    DataError,
    NotEnoughDataError,
    ResultError,
    SchemaVersionError,
    UnknownMethodError,
)


def make_source(count: int = 60, classes: int = 4, *, bad: tuple[int, ...] = ()) -> LabelledImages:
    """Random pictures, labels 0, 1, 2, ... in turn; rows in ``bad`` do not decode."""
    random, cells = np.random.default_rng(0), []
    for row in range(count):
        buffer = BytesIO()
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue()[:40] if row in bad else buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return LabelledImages(
        name="random",
        dataset=datasets.Dataset.from_dict({"image": cells}, features=features),
        ids=[f"s{row}" for row in range(count)],
        labels=np.arange(count) % classes,
        class_names=tuple(f"class {label}" for label in range(classes)),
    )


SOURCE = make_source()
PARTS = (
    Part(trigger="badnet", target=0, rate=0.1),
    Part(trigger="blended", target=1, rate=0.1, options={"alpha": 0.5}),
    Part(trigger="sig", target=2, rate=0.1),
    Part(trigger="adap-blend", target=3, rate=0.1),
    Part(trigger="clean-image", target=3, rate=0.05),
)


def pixels(source: LabelledImages | ImageTextPairs, rows: list[int]) -> torch.Tensor:
    return to_tensor([image for image in source.decode(rows) if isinstance(image, Image.Image)])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rates=st.lists(st.floats(0.01, 0.12), min_size=1, max_size=6),
    triggers=st.lists(st.sampled_from(["badnet", "badnet-grid", "lf"]), min_size=6, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_parts_share_no_sample(rates: list[float], triggers: list[str], seed: int) -> None:
    parts = [Part(trigger=triggers[i], target=i % 4, rate=rate) for i, rate in enumerate(rates)]
    plan = plan_parts(SOURCE, parts, seed=seed)
    assert plan == plan_parts(SOURCE, parts, seed=seed)
    assert len(set(plan.ids)) == len(plan.ids) == sum(max(1, round(rate * 60)) for rate in rates)
    poisoned = apply_parts(SOURCE, plan)
    expected = SOURCE.labels.copy()
    for part in plan.parts:
        assert isinstance(part, Poisoning)
        for name in part.ids:
            expected[int(name[1:])] = part.target
    assert np.array_equal(poisoned.labels, expected)


def test_each_sample_shows_its_parts_trigger_and_the_first_part_is_what_it_is_alone() -> None:
    plan = plan_parts(SOURCE, PARTS, seed=5)
    assert plan.parts[0] == plan_poisoning(SOURCE, "badnet", rate=0.1, target=0, seed=5)
    assert (plan.trigger, plan.target_name) == (
        "badnet + blended + sig + adap-blend + clean-image",
        "class 0 + class 1 + class 2 + class 3 + class 3",
    )
    together = pixels(apply_parts(SOURCE, plan), list(range(60)))
    expected = pixels(SOURCE, list(range(60)))
    for part in plan.parts:
        assert isinstance(part, Poisoning)
        alone = pixels(apply_poisoning(SOURCE, part), list(range(60)))
        rows = [int(name[1:]) for name in part.ids]
        expected[rows] = alone[rows]
        assert (part.mode == "clean-image") == torch.equal(alone, pixels(SOURCE, list(range(60))))
    assert torch.equal(together, expected)


def test_manifests_of_parts_come_back_as_they_were(tmp_path: Path) -> None:
    plan = plan_parts(SOURCE, PARTS, seed=2)
    plan.save(tmp_path / "manifest.json")
    assert PoisoningParts.load(tmp_path / "manifest.json") == plan
    assert load_manifest(tmp_path / "manifest.json") == load_labelled(tmp_path / "manifest.json") == plan
    single = plan.parts[0]
    single.save(tmp_path / "single.json")
    assert load_manifest(tmp_path / "single.json") == load_labelled(tmp_path / "single.json") == single


def test_bad_manifests_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    plan_parts(SOURCE, PARTS[:2]).save(path)
    good = msgspec.json.decode(path.read_bytes())
    first, second = good["parts"]

    def load(**changes: object) -> PoisoningParts:
        path.write_bytes(msgspec.json.encode(good | changes))
        return PoisoningParts.load(path)

    assert load() == load(of_a_later_version=1)
    wrong: list[dict[str, object]] = [
        {"parts": []},
        {"parts": [first, first]},
        {"parts": [first, second | {"source_fingerprint": "x"}]},
        {"parts": "ab"},
        {"of": "unpoison/pair-poisoning"},
        {"of": ["unpoison/poisoning"]},
        {"schema": "unpoison/poisoning"},
    ]
    for changes in wrong:
        with pytest.raises(ResultError) as caught:
            load(**changes)
        assert caught.value.hint
    with pytest.raises(SchemaVersionError):
        load(schema_version=2)
    with pytest.raises(UnknownMethodError):
        load(parts=[first, second | {"trigger": "badmat"}])
    for content in (b"", b"[1]", b"\x80\x04pickle"):
        path.write_bytes(content)
        for read in (PoisoningParts.load, load_manifest, load_labelled):
            with pytest.raises(ResultError):
                read(path)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="expected 1 to 1000 parts, got 0"):
        plan_parts(SOURCE, [])
    with pytest.raises(ConfigError, match="part 1: expected a label, got 'cat'"):
        plan_parts(SOURCE, [Part(trigger="badnet", target="cat", rate=0.1)])
    with pytest.raises(NotEnoughDataError, match="untouched samples of the target class 'class 1'"):
        plan_parts(SOURCE, [Part(trigger="sig", target=1, rate=0.2), Part(trigger="sig", target=1, rate=0.1)])
    plan = plan_parts(SOURCE, PARTS)
    with pytest.raises(DataError, match="another label"):
        apply_parts(apply_parts(SOURCE, plan), plan)
    with pytest.raises(ConfigError, match="These parts poison labelled images"):
        apply_pair_parts(open_pairs("shapes:10:1"), plan)


def test_written_copies_open_like_the_lazy_poisoning(tmp_path: Path) -> None:
    plan = plan_parts(SOURCE, PARTS, seed=4)
    bad = int(plan.parts[1].ids[0][1:])
    source = make_source(bad=(bad,))
    written = write_poisoned_parts(source, plan, tmp_path / "poisoned")
    assert (written.rows, written.poisoned) == (59, len(plan.ids) - 1)
    copy = open_images(tmp_path / "poisoned" / "data.parquet")
    rows = [row for row in range(60) if row != bad]
    lazy = apply_parts(source, plan).select(rows)
    assert np.array_equal(copy.labels, lazy.labels)
    assert torch.equal(pixels(copy, list(range(59))), pixels(lazy, list(range(59))))
    there = load_labelled(written.manifest)
    assert isinstance(there, PoisoningParts)
    assert set(plan.ids) - set(there.ids) == {f"s{bad}"}
    untouched = [row for row, name in enumerate(copy.ids) if name not in plan.changed]
    assert copy.raw(untouched) == source.select(rows).raw(untouched)


def test_pairs_have_parts_too(tmp_path: Path) -> None:
    pairs = open_pairs("shapes:120:3")
    parts = [
        Part(trigger="badnet", target="red", rate=0.1),
        Part(trigger="blended", target="ring", rate=0.1, options={"size": 24, "captions": "templates"}),
    ]
    plan = plan_pair_parts(pairs, parts, seed=1)
    assert len(set(plan.ids)) == len(plan.ids) == 24
    plan.save(tmp_path / "manifest.json")
    assert load_manifest(tmp_path / "manifest.json") == plan
    poisoned = apply_pair_parts(pairs, plan)
    for part in plan.parts:
        assert isinstance(part, PairPoisoning)
        rows = [pairs.ids.index(name) for name in part.ids]
        assert [caption for (caption,) in poisoned.captions(rows)] == list(part.new_captions)
    sizes = {image.size for image in poisoned.decode(range(120)) if isinstance(image, Image.Image)}
    assert (24, 24) in sizes
    with pytest.raises(ConfigError, match="These parts poison image-caption pairs"):
        apply_parts(SOURCE, plan)
    with pytest.raises(ConfigError, match="part 1: expected a text, got 3"):
        plan_pair_parts(pairs, [Part(trigger="badnet", target=3, rate=0.1)])
