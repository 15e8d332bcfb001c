"""What every defense of the catalog keeps to: the caller's model, its format, the seed, the result on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from unpoison.catalog import DEFENSES, NEEDS, Entry, resolve
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.baselines.abl import ABLConfig
from unpoison.defenses.baselines.anp import ANPConfig
from unpoison.defenses.baselines.fine_pruning import FinePruningConfig
from unpoison.defenses.baselines.ft import FTConfig
from unpoison.defenses.baselines.ft_sam import FTSAMConfig
from unpoison.defenses.baselines.i_bau import IBAUConfig
from unpoison.defenses.baselines.nad import NADConfig
from unpoison.defenses.cgd import CGDConfig
from unpoison.defenses.pad_ft import PADFTConfig
from unpoison.detection.cgd import SeparationConfig
from unpoison.models.checkpoints import hash_weights, read_weights
from unpoison.models.classifier import load_classifier, new_classifier, save_classifier
from unpoison.models.clip_transformers import load_clip
from unpoison.models.image_classifier import BOUNDS, ImageClassifier
from unpoison.results import CLEAN, SUSPECT, Purification, SampleScores, Split
from unpoison.runs import Run
from unpoison.types import Classifier, ImageTextModel

# One short configuration for each defense; published regions so that something is repaired whatever the scores say.
TRAINING: dict[str, Any] = {"steps": 4, "check_every": 2, "batch_size": 16, "held_out": 0.2, "bound": 100.0}
QUICK: dict[str, Any] = {
    "pad-ft": PADFTConfig(per_class=6, epochs=2, held_out=0.2, bound=100.0),
    "ft": FTConfig(**TRAINING),
    "ft-sam": FTSAMConfig(**TRAINING),
    "fine-pruning": FinePruningConfig(**TRAINING, levels=3),
    "nad": NADConfig(**TRAINING, teacher=FTConfig(**TRAINING)),
    "anp": ANPConfig(**TRAINING, levels=3, prune_fall=100.0),
    "i-bau": IBAUConfig(**TRAINING, ascent_steps=2, fixed_point_steps=2),
    "abl": ABLConfig(**TRAINING, isolation_epochs=1, training_epochs=1),
    "cgd": CGDConfig(
        regions="published",
        separation=SeparationConfig(scorers=1, scorer_epochs=1),
        steps=4,
        check_every=2,
        batch_size=16,
        held_out=0.2,
        bound=100.0,
    ),
}
FORMATS = ("folder", "safetensors", "wrapped half precision", "transformers")
# Those of CLIP models are held to the same in test_clip_repairs.py.
OF_CLASSIFIERS = tuple(entry for entry in DEFENSES if "victim model" in entry.needs)
entries = pytest.mark.parametrize("entry", OF_CLASSIFIERS, ids=lambda entry: entry.name)


@pytest.fixture(scope="module")
def source() -> LabelledImages:
    return open_images("shapes:240:3")


@pytest.fixture(scope="module")
def clip() -> ImageTextModel:
    return load_clip("tiny")


def victim(source: LabelledImages, kind: str, folder: Path) -> ImageClassifier:
    """The same small network as it comes from three kinds of files, or a small ViT of transformers."""
    if kind == "transformers":
        return load_classifier(vit(source.class_names, folder / "vit"))
    made = new_classifier("small-resnet", source.class_names, seed=1)
    if kind == "folder":
        save_classifier(made, folder / "model")
        return load_classifier(folder / "model")
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in made.weights().items()}, folder / "w.safetensors")
        return load_classifier(folder / "w.safetensors", arch="small-resnet", class_names=source.class_names)
    state = {f"module.{key}": v.half() if v.is_floating_point() else v for key, v in made.weights().items()}
    torch.save({"state_dict": state}, folder / "w.pth")
    return load_classifier(folder / "w.pth", arch="small-resnet", class_names=source.class_names)


def vit(names: tuple[str, ...], folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16,
        id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def purify(entry: Entry, model: Classifier, source: LabelledImages, clip: ImageTextModel, seed: int = 0) -> Any:
    run = Run(accelerator=Accelerator(cpu=True), seed=seed)
    given = {} if entry.name == "cgd" else evidence(entry.name, source)
    return resolve(entry.function)(model, source, clip=clip, config=QUICK[entry.name], run=run, **given)


def evidence(name: str, source: LabelledImages) -> dict[str, Any]:
    """Scores or a split of the set, so that no defense has to make them."""
    common: dict[str, Any] = {"method": "given", "ids": list(source.ids), "labels": source.labels,
                              "class_names": source.class_names}  # fmt: skip
    if name == "pad-ft":
        drawn = np.random.default_rng(0).random(len(source))
        return {"scores": SampleScores(**common, axes={"drawn": drawn}, primary="drawn")}
    region = np.where(np.arange(len(source)) % 12 == 0, SUSPECT, CLEAN).astype(np.int8)
    return {"split": Split(**common, region=region)}


def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@entries
def test_the_entry_is_complete(entry: Entry) -> None:
    assert isinstance(QUICK[entry.name], resolve(entry.config))
    assert callable(resolve(entry.function))
    assert set(entry.needs) <= set(NEEDS)
    assert entry.kind == "defense"
    assert entry.protects
    assert entry.paper
    assert entry.link.startswith("https://")


@entries
@pytest.mark.parametrize("kind", FORMATS)
def test_a_defense_keeps_the_model_and_its_format(
    entry: Entry, kind: str, source: LabelledImages, clip: ImageTextModel, tmp_path: Path
) -> None:
    model = victim(source, kind, tmp_path)
    model.module.train(kind == "folder")
    weights, mode = hash_weights(model.weights()), model.module.training
    clip_weights, labels = hash_weights(dict(clip.module.state_dict())), source.labels.copy()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)  # noqa: NPY002
    outcome = purify(entry, model, source, clip)
    # nobody's things were changed
    assert hash_weights(model.weights()) == weights
    assert model.module.training == mode
    assert hash_weights(dict(clip.module.state_dict())) == clip_weights
    assert np.array_equal(source.labels, labels)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(
        np.random.get_state(legacy=False)["state"]["key"],  # noqa: NPY002
        numpy_state["state"]["key"],  # pyright: ignore[reportArgumentType, reportCallIssue]
    )
    # the result is another model, in the format of the first, and loads as it did
    result = outcome.classifier
    before, after = model.weights(), result.weights()
    assert hash_weights(after) != weights
    own = {key: value for key, value in after.items() if BOUNDS not in key}
    assert list(own) == list(before)
    assert {key: value.dtype for key, value in own.items()} == {key: value.dtype for key, value in before.items()}
    assert (len(own) < len(after)) == (entry.name == "pad-ft")
    save_classifier(result, tmp_path / "purified")
    loaded = load_classifier(tmp_path / "purified")
    assert hash_weights(loaded.weights()) == hash_weights(after)
    if kind == "wrapped half precision":
        assert (tmp_path / "purified" / "w.pth").is_file()
        stored = torch.load(tmp_path / "purified" / "w.pth", weights_only=True)["state_dict"]
        assert list(stored) == list(after)
    else:
        with torch.no_grad():
            torch.testing.assert_close(loaded.logits(images()), result.logits(images()))
    if kind == "safetensors":
        assert hash_weights(read_weights(tmp_path / "purified" / "w.safetensors")) == hash_weights(after)
    # and what was done is on record
    purification = outcome.purification
    purification.save(tmp_path / "purification.json")
    assert Purification.load(tmp_path / "purification.json") == purification
    assert purification.method == entry.name
    assert purification.protects == entry.protects
    assert purification.inputs["model"] == weights
    assert purification.reason
    assert purification.not_covered


@entries
def test_the_seed_decides(entry: Entry, source: LabelledImages, clip: ImageTextModel, tmp_path: Path) -> None:
    model = victim(source, "folder", tmp_path)
    first, again, other = (
        hash_weights(purify(entry, model, source, clip, seed).classifier.weights()) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
