"""``unpoison attack`` as a process, with triggers that plant and test in two forms and with dithering."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.overlay import to_tensor
from unpoison.attacks.parts import Part, PoisoningParts, plan_parts
from unpoison.attacks.triggers import as_planted, make_trigger
from unpoison.data.sources import open_images
from unpoison.models.classifier import new_classifier, save_classifier


@pytest.mark.parametrize(("name", "param", "covers"), [("bpp", "levels=4", 0), ("adap-patch", "cover=0.5", 4)])
def test_a_poisoned_copy_is_what_the_trigger_makes(
    process: Callable, tmp_path: Path, name: str, param: str, covers: int
) -> None:
    words = ("attack", name, "shapes:80:3", "--rate", "0.1", "--target", "star", "--param", param, "-o", "p", "--json")
    done = process(*words)
    assert done.code == 0, done.err
    body = json.loads(done.out)
    assert (body["trigger"], body["poisoned"], body["covers"], body["samples"]) == (name, 8, covers, 80)
    plan = Poisoning.load(tmp_path / "p" / "manifest.json")
    source, copy = open_images("shapes:80:3"), open_images(tmp_path / "p" / "data.parquet")
    assert len(plan.covers) == covers
    assert int((source.labels != copy.labels).sum()) == 8 - covers
    rows = [source.ids.index(sample) for sample in plan.ids]
    before, after = (
        to_tensor([image for image in images.decode(rows) if isinstance(image, Image.Image)])
        for images in (source, copy)
    )
    turned = as_planted(make_trigger(name, plan.config)).apply(before, seed=plan.seed, ids=plan.ids)
    assert torch.allclose(after, turned, atol=0.5 / 255 + 1e-6)
    assert not torch.equal(after, before)
    others = np.setdiff1d(np.arange(80), rows)
    assert copy.raw(others) == source.raw(others)


def test_evaluate_reads_a_manifest_of_parts(process: Callable, tmp_path: Path) -> None:
    source = open_images("shapes:60:3")
    save_classifier(new_classifier("small-resnet", source.class_names), tmp_path / "model")
    parts = [Part(trigger="badnet", target=0, rate=0.05), Part(trigger="ctrl", target=1, rate=0.05)]
    plan_parts(source, parts).save(tmp_path / "parts.json")
    words = ("evaluate", "model", "--data", "shapes:60:3", "--manifest", "parts.json")
    done = process(*words, "--json")
    assert done.code == 0, done.err
    body = json.loads(done.out)
    assert [(part["attack"], part["target"]) for part in body["parts"]] == [
        (name, source.class_names[label]) for label, name in enumerate(("badnet", "ctrl"))
    ]
    assert body["asr"]["n"] == sum(part["asr"]["n"] for part in body["parts"])
    assert "ctrl, target" in process(*words).out


def test_a_further_poisoning_goes_on_other_samples(process: Callable, tmp_path: Path) -> None:
    words = ("attack", "badnet", "shapes:80:3", "--rate", "0.1", "--target", "star")
    further = "blended rate=0.05 target=rings alpha=0.5"
    done = process(*words, "--and", further, "-o", "p", "--json")
    assert done.code == 0, done.err
    body = json.loads(done.out)
    assert (body["poisoned"], body["samples"]) == (12, 80)
    assert [(part["trigger"], part["target_name"], part["poisoned"]) for part in body["parts"]] == [
        ("badnet", "star", 8), ("blended", "rings", 4)
    ]  # fmt: skip
    assert body["parts"][1]["config"]["alpha"] == 0.5
    plan = PoisoningParts.load(tmp_path / "p" / "manifest.json")
    assert len(set(plan.ids)) == 12
    again = process(*words, "--and", further, "-o", "p")
    assert again.code == 0, again.err
    assert "4 of 80 samples poisoned with blended" in again.out
    other = process(*words, "--and", "blended rate=0.05 target=rings alpha=0.2", "-o", "p")
    assert other.code == 2
    assert "alpha" in other.err
    for wrong, said in (("", "trigger's name"), ("blendet", "blended"), ("blended rate=much", "no number")):
        refused = process(*words, "--and", wrong, "-o", "q")
        assert refused.code == 2
        assert said in refused.err


def test_samples_are_chosen_near_a_clips_boundary(process: Callable, tmp_path: Path) -> None:
    words = ("attack", "badnet", "shapes:80:3", "--rate", "0.1", "--target", "star", "--manifest-only", "--json")
    words += ("--cache", "cache")
    drawn, chosen = process(*words, "-o", "drawn"), process(*words, "--select", "boundary", "-o", "chosen")
    assert (drawn.code, chosen.code) == (0, 0), chosen.err
    assert json.loads(drawn.out)["selection"] == "random"
    assert json.loads(chosen.out)["selection"] == "boundary"
    plans = [Poisoning.load(tmp_path / name / "manifest.json") for name in ("drawn", "chosen")]
    assert plans[0].ids != plans[1].ids
    assert plans[1].selected_by
    assert len(plans[1].ids) == 8
    other = process(*words, "-o", "chosen")
    assert other.code == 2
    assert "selection" in other.err


def test_a_picture_of_a_file_is_mixed_in(process: Callable, tmp_path: Path) -> None:
    from PIL import Image

    from unpoison.attacks.blended import Blended
    from unpoison.attacks.manifest import Poisoning

    Image.new("RGB", (5, 5), (10, 200, 30)).save(tmp_path / "p.png")
    done = process(
        "attack", "blended", "shapes:40:0", "--param", "pattern=p.png", "--param", "alpha=0.5", "-o", "out", "--json"
    )
    assert done.code == 0, done.err
    trigger = Poisoning.load(tmp_path / "out" / "manifest.json").make_trigger()
    assert isinstance(trigger, Blended)
    assert trigger.pattern
    (tmp_path / "p.png").write_text("none")
    done = process("attack", "blended", "shapes:40:0", "--param", "pattern=p.png", "-o", "other")
    assert done.code == 2
    assert "p.png is no picture" in done.err
