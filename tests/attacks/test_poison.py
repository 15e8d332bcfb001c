"""Planning, saving, applying and writing poisonings."""

import io
from pathlib import Path

import datasets
import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unpoison.attacks.clean_image import CleanImage
from unpoison.attacks.overlay import to_tensor
from unpoison.attacks.poison import (
    Poisoning,
    apply_poisoning,
    plan_poisoning,
    trigger_test_images,
    trigger_test_source,
    write_poisoned,
)
from unpoison.attacks.triggers import TRIGGERS, as_planted, make_trigger
from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import (
    ConfigError,
    DataError,
    LabelRangeError,
    NotEnoughDataError,
    ResultError,
    SchemaVersionError,
    SourceFormatError,
    UnknownMethodError,
    UsageError,
)
from unpoison.results import SkippedRow


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_source(
    count: int = 40, classes: int = 4, *, bad: tuple[int, ...] = (), sizes: tuple[tuple[int, int], ...] = ((16, 16),)
) -> LabelledImages:
    """Random pictures, labels 0, 1, 2, ... in turn; rows in ``bad`` do not decode."""
    random = np.random.default_rng(0)
    cells = []
    for row in range(count):
        width, height = sizes[row % len(sizes)]
        content = png(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        cells.append({"bytes": content[:40] if row in bad else content, "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return LabelledImages(
        name="random",
        dataset=datasets.Dataset.from_dict({"image": cells}, features=features),
        ids=[f"s{row}" for row in range(count)],
        labels=np.arange(count, dtype=np.int64) % classes,
        class_names=tuple(f"class {label}" for label in range(classes)),
    )


def pixels(source: LabelledImages, rows: list[int]) -> torch.Tensor:
    images = source.decode(rows)
    return to_tensor([image for image in images if isinstance(image, Image.Image)])


SOURCE = make_source()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rate=st.floats(0.01, 1),
    target=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["all-to-one", "all-to-all", "clean-label"]),
)
def test_the_plan_keeps_its_books(rate: float, target: int, seed: int, mode: str) -> None:
    need = max(1, round(rate * 40))
    eligible = {"all-to-one": 30, "all-to-all": 40, "clean-label": 10}[mode]
    if need > eligible:
        with pytest.raises(NotEnoughDataError) as caught:
            plan_poisoning(SOURCE, "badnet", rate=rate, target=target, seed=seed, mode=mode)
        assert (caught.value.have, caught.value.need) == (eligible, need)
        return
    plan = plan_poisoning(SOURCE, "badnet", rate=rate, target=target, seed=seed, mode=mode)
    assert plan == plan_poisoning(SOURCE, "badnet", rate=rate, target=target, seed=seed, mode=mode)
    assert len(set(plan.ids)) == len(plan.ids) == need
    for name, old, new in zip(plan.ids, plan.original_labels, plan.new_labels, strict=True):
        assert old == int(name[1:]) % 4
        if mode == "all-to-one":
            assert old != target
            assert new == target
        elif mode == "all-to-all":
            assert new == (old + 1) % 4
        else:
            assert old == new == target
    poisoned = apply_poisoning(SOURCE, plan)
    chosen = np.isin(SOURCE.ids, plan.ids)
    assert np.array_equal(poisoned.labels[chosen], plan.new_labels)
    assert np.array_equal(poisoned.labels[~chosen], SOURCE.labels[~chosen])


def test_another_seed_chooses_other_samples() -> None:
    plans = {plan_poisoning(SOURCE, "badnet", rate=0.2, seed=seed).ids for seed in range(5)}
    assert len(plans) == 5


def test_usual_modes() -> None:
    modes = {name: plan_poisoning(SOURCE, name, rate=0.1).mode for name in TRIGGERS}
    others = dict.fromkeys(("sig", "label-consistent", "ctrl"), "clean-label") | {"clean-image": "clean-image"}
    assert modes == {name: others.get(name, "all-to-one") for name in TRIGGERS}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["adap-blend", "adap-patch"]),
    rate=st.floats(0.01, 0.7),
    cover=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["all-to-one", "all-to-all"]),
)
def test_covers_keep_their_label(name: str, rate: float, cover: float, seed: int, mode: str) -> None:
    plan = plan_poisoning(SOURCE, name, rate=rate, target=1, seed=seed, mode=mode, cover=cover)
    need = max(1, round(rate * 40))
    assert len(plan.ids) == need
    assert len(plan.covers) == min(round(cover * need), need - 1)
    wanted = plan.attack_labels(np.array(plan.original_labels))
    for sample, old, new, goal in zip(plan.ids, plan.original_labels, plan.new_labels, wanted.tolist(), strict=True):
        assert new == (old if sample in plan.covers else goal)
        assert old != goal
    assert plan == plan_poisoning(SOURCE, name, rate=rate, target=1, seed=seed, mode=mode, cover=cover)


def test_training_samples_show_the_planted_form_and_test_samples_the_whole() -> None:
    rows = list(range(40))
    for name in ("adap-blend", "adap-patch", "ctrl"):
        plan = plan_poisoning(SOURCE, name, rate=0.2, target=1, seed=3)
        trigger = make_trigger(name, {})
        chosen = [row for row in rows if SOURCE.ids[row] in plan.ids]
        images, ids = pixels(SOURCE, chosen), [SOURCE.ids[row] for row in chosen]
        planted = as_planted(trigger).apply(images, seed=3, ids=ids)
        assert torch.allclose(pixels(apply_poisoning(SOURCE, plan), chosen), planted, atol=0.5 / 255 + 1e-6)
        triggered, outside, _ = trigger_test_source(SOURCE, plan)
        whole = trigger.apply(pixels(SOURCE, outside.tolist()), seed=3)
        assert torch.allclose(pixels(triggered, list(range(len(outside)))), whole, atol=0.5 / 255 + 1e-6)
        assert not torch.equal(trigger.apply(images, seed=3), planted)


def test_clean_image_relabels_the_samples_most_like_the_pattern() -> None:
    plan = plan_poisoning(SOURCE, "clean-image", rate=0.2, target=1, seed=7)
    decoded = [image for image in SOURCE.decode(range(40)) if isinstance(image, Image.Image)]
    images = [image.resize((32, 32), Image.Resampling.BOX) for image in decoded]
    scores = CleanImage().resemblance(to_tensor(images), seed=7).numpy()
    outside = [row for row in np.argsort(-scores) if SOURCE.labels[row] != 1]
    assert set(plan.ids) == {f"s{row}" for row in outside[:8]}
    poisoned = apply_poisoning(SOURCE, plan)
    assert poisoned.raw(range(40)) == SOURCE.raw(range(40))
    assert torch.equal(pixels(poisoned, list(range(40))), pixels(SOURCE, list(range(40))))
    assert int((poisoned.labels != SOURCE.labels).sum()) == 8


def test_clean_image_leaves_out_what_does_not_decode() -> None:
    source = make_source(bad=(0, 5, 6))
    plan = plan_poisoning(source, "clean-image", rate=0.6, target=3)
    assert len(plan.ids) == 24
    assert not {"s0", "s5", "s6"} & set(plan.ids)
    with pytest.raises(NotEnoughDataError):
        plan_poisoning(source, "clean-image", rate=0.75, target=3)


@pytest.mark.parametrize("name", ["badnet", "blended", "sig"])
def test_the_trigger_is_on_the_poisoned_samples_and_no_other(name: str) -> None:
    source = make_source(sizes=((16, 16), (24, 16), (33, 40)), bad=(4,))
    plan = plan_poisoning(source, name, rate=0.2, seed=3)
    poisoned = apply_poisoning(source, plan)
    trigger = make_trigger(name, {})
    rows = list(range(40))
    before, after = source.decode(rows), poisoned.decode(rows)
    for row, old, new in zip(rows, before, after, strict=True):
        if row == 4:
            assert isinstance(new, SkippedRow)
            continue
        assert isinstance(old, Image.Image)
        assert isinstance(new, Image.Image)
        expected = np.asarray(old)
        if source.ids[row] in plan.ids:
            turned = trigger.apply(to_tensor([old]), seed=3)[0].permute(1, 2, 0).numpy()
            expected = np.rint(turned * 255)
            assert not np.array_equal(expected, np.asarray(old))
        assert np.array_equal(np.asarray(new), expected)


def test_resampled_patterns_do_not_depend_on_the_order_of_decoding() -> None:
    plan = plan_poisoning(SOURCE, "blended", rate=0.5, resample=True)
    poisoned = apply_poisoning(SOURCE, plan)
    backwards = list(range(39, -1, -1))
    assert torch.equal(pixels(poisoned, list(range(40))), pixels(poisoned, backwards).flip(0))


def test_fingerprints_tell_poisonings_apart() -> None:
    plans = [
        plan_poisoning(SOURCE, "blended", rate=0.2),
        plan_poisoning(SOURCE, "blended", rate=0.2, alpha=0.1),
        plan_poisoning(SOURCE, "blended", rate=0.2, seed=1),
        plan_poisoning(SOURCE, "badnet", rate=0.2),
    ]
    overlays = [apply_poisoning(SOURCE, plan).overlay for plan in plans]
    assert len({overlay.fingerprint for overlay in overlays if overlay}) == 4
    again = apply_poisoning(SOURCE, plans[0]).overlay
    assert again is not None
    assert overlays[0] is not None
    assert again.fingerprint == overlays[0].fingerprint


def test_refusals() -> None:
    with pytest.raises(UnknownMethodError):
        plan_poisoning(SOURCE, "badnte", rate=0.1)
    with pytest.raises(ConfigError, match="no parameter"):
        plan_poisoning(SOURCE, "badnet", rate=0.1, alpha=0.2)
    with pytest.raises(ConfigError, match="no mode 'all-to-none'"):
        plan_poisoning(SOURCE, "badnet", rate=0.1, mode="all-to-none")
    with pytest.raises(ConfigError, match="no mode"):
        plan_poisoning(SOURCE, "clean-image", rate=0.1, mode="all-to-one")
    with pytest.raises(ConfigError, match="seed"):
        plan_poisoning(SOURCE, "badnet", rate=0.1, seed=-1)
    for rate in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ConfigError, match=r"rate must be in \(0, 1\]"):
            plan_poisoning(SOURCE, "badnet", rate=rate)
    for target in (-1, 4):
        with pytest.raises(LabelRangeError, match=f"target {target}"):
            plan_poisoning(SOURCE, "badnet", rate=0.1, target=target)


def test_applying_to_other_data_is_refused() -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.5)
    with pytest.raises(DataError, match=r"\d+ of 20 ids of the poisoning are not in random"):
        apply_poisoning(SOURCE.select(range(10)), plan)
    with pytest.raises(DataError, match="another label"):
        apply_poisoning(apply_poisoning(SOURCE, plan), plan)
    with pytest.raises(DataError, match="The classes of random are"):
        apply_poisoning(make_source(classes=5), plan)


@pytest.mark.parametrize("name", TRIGGERS)
def test_manifests_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    plan = plan_poisoning(SOURCE, name, rate=0.1, target=2, seed=9)
    plan.save(tmp_path / "manifest.json")
    assert Poisoning.load(tmp_path / "manifest.json") == plan


def test_bad_manifests_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    plan_poisoning(SOURCE, "badnet", rate=0.1).save(path)
    good = msgspec.json.decode(path.read_bytes())

    def load(**changes: object) -> Poisoning:
        path.write_bytes(msgspec.json.encode(good | changes))
        return Poisoning.load(path)

    assert load() == load(unknown_key_of_a_later_minor_version=1)
    with pytest.raises(SchemaVersionError, match="schema version 2, this version reads 1"):
        load(schema_version=2)
    with pytest.raises(ResultError, match=r"expected unpoison/poisoning, found unpoison/split"):
        load(schema="unpoison/split")
    with pytest.raises(ResultError, match="ids"):
        load(ids="s1")
    with pytest.raises(ResultError, match="3 ids"):
        load(ids=["s1", "s2", "s3"])
    with pytest.raises(LabelRangeError, match="label 99"):
        load(target=99)
    with pytest.raises(UnknownMethodError):
        load(trigger="badmat")
    with pytest.raises(ConfigError, match="no parameter"):
        load(config={"code": "import os"})
    for content in (b"", b"[1, 2]", b"\x80\x04pickle", b"7"):
        path.write_bytes(content)
        with pytest.raises(ResultError):
            Poisoning.load(path)
    with pytest.raises(ResultError, match="not a readable manifest"):
        Poisoning.load(tmp_path / "absent.json")


def test_triggered_test_samples_leave_the_target_class_out() -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.1, target=2)
    triggered, rows, wanted = trigger_test_source(SOURCE, plan)
    assert rows.tolist() == [row for row in range(40) if row % 4 != 2]
    assert np.array_equal(triggered.labels, SOURCE.labels[rows])
    assert set(wanted.tolist()) == {2}
    assert triggered.raw([0]) == SOURCE.raw([0])
    shown = pixels(triggered, list(range(30)))
    assert (shown[:, :, -3:, -3:] == make_trigger("badnet", {}).apply(shown)[:, :, -3:, -3:]).all()


def test_all_to_all_matches_the_next_class() -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.1, mode="all-to-all")
    _, rows, wanted = trigger_test_source(SOURCE, plan)
    assert len(rows) == 40
    assert wanted.tolist() == [(row + 1) % 4 for row in range(40)]


@pytest.mark.parametrize("name", TRIGGERS)
def test_tensors_are_triggered_like_sources(name: str) -> None:
    plan = plan_poisoning(SOURCE, name, rate=0.1, target=1)
    source, _, wanted = trigger_test_source(SOURCE, plan)
    turned, labels = trigger_test_images(pixels(SOURCE, list(range(40))), SOURCE.labels, plan, ids=SOURCE.ids)
    assert np.array_equal(labels, wanted)
    assert torch.allclose(turned, pixels(source, list(range(30))), atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("name", TRIGGERS)
def test_written_copies_open_like_the_lazy_poisoning(name: str, tmp_path: Path) -> None:
    source = make_source(600)
    plan = plan_poisoning(source, name, rate=0.1, target=1)
    written = write_poisoned(source, plan, tmp_path / "poisoned")
    assert (written.rows, written.poisoned, written.skipped) == (600, 60, ())
    assert sorted(path.name for path in (tmp_path / "poisoned").iterdir()) == ["data.parquet", "manifest.json"]
    copy, lazy = open_images(tmp_path / "poisoned" / "data.parquet"), apply_poisoning(source, plan)
    assert copy.ids == source.ids
    assert copy.class_names == source.class_names
    assert np.array_equal(copy.labels, lazy.labels)
    assert torch.equal(pixels(copy, list(range(600))), pixels(lazy, list(range(600))))
    changed = set() if name == "clean-image" else set(plan.ids)
    kept = [row for row in range(600) if source.ids[row] not in changed]
    assert copy.raw(kept) == source.raw(kept)
    assert Poisoning.load(tmp_path / "poisoned" / "manifest.json") == plan
    assert written.data is not None
    assert pq.ParquetFile(written.data).num_row_groups > 1


def test_written_copies_are_hugging_face_parquet(tmp_path: Path) -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.1)
    write_poisoned(SOURCE, plan, tmp_path / "poisoned")
    loaded = datasets.Dataset.from_parquet(
        str(tmp_path / "poisoned" / "data.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded, datasets.Dataset)
    assert loaded.features["label"].names == list(SOURCE.class_names)
    assert isinstance(loaded[0]["image"], Image.Image)
    assert loaded["id"][:] == SOURCE.ids


def test_unreadable_samples_are_left_out_of_both_files(tmp_path: Path) -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.5)
    row = SOURCE.ids.index(plan.ids[0])
    source = make_source(bad=(row,))
    written = write_poisoned(source, plan, tmp_path / "poisoned")
    assert [skip.id for skip in written.skipped] == [plan.ids[0]]
    assert (written.rows, written.poisoned) == (39, 19)
    manifest = Poisoning.load(tmp_path / "poisoned" / "manifest.json")
    assert manifest.ids == plan.ids[1:]
    assert set(manifest.ids) <= set(open_images(tmp_path / "poisoned" / "data.parquet").ids)


def test_too_many_unreadable_samples_stop_the_copy(tmp_path: Path) -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.5)
    bad = tuple(SOURCE.ids.index(name) for name in plan.ids[:6])
    with pytest.raises(SourceFormatError):
        write_poisoned(make_source(bad=bad), plan, tmp_path / "poisoned")
    assert list((tmp_path / "poisoned").iterdir()) == []


def test_the_manifest_alone(tmp_path: Path) -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.1)
    written = write_poisoned(SOURCE, plan, tmp_path / "poisoned", manifest_only=True)
    assert written.data is None
    assert [path.name for path in (tmp_path / "poisoned").iterdir()] == ["manifest.json"]
    assert Poisoning.load(written.manifest) == plan


def test_folders_in_use_are_not_touched(tmp_path: Path) -> None:
    plan = plan_poisoning(SOURCE, "badnet", rate=0.1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        write_poisoned(SOURCE, plan, tmp_path / "full")
    with pytest.raises(UsageError, match="cannot be written"):
        write_poisoned(SOURCE, plan, tmp_path / "full" / "thesis.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".data.parquet.1.partial").write_bytes(b"half")
    assert write_poisoned(SOURCE, plan, tmp_path / "killed").rows == 40


def test_a_poisoned_source_can_be_poisoned_again_and_written(tmp_path: Path) -> None:
    first = apply_poisoning(SOURCE, plan_poisoning(SOURCE, "blended", rate=0.2, seed=1))
    second = plan_poisoning(first, "badnet", rate=0.2, seed=2)
    both = apply_poisoning(first, second)
    write_poisoned(first, second, tmp_path / "poisoned")
    copy = open_images(tmp_path / "poisoned" / "data.parquet")
    assert torch.equal(pixels(copy, list(range(40))), pixels(both, list(range(40))))
    assert not torch.equal(pixels(both, list(range(40))), pixels(first, list(range(40))))
