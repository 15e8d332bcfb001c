"""The classifier contract for every kind of network, and the round trip of every format."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unpoison.errors import (
    CheckpointMismatchError,
    ModelError,
    SchemaVersionError,
    UnknownMethodError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    UsageError,
)
from unpoison.models.checkpoints import hash_weights, read_weights, save_weights
from unpoison.models.classifier import ImageClassifier, load_classifier, new_classifier, save_classifier
from unpoison.types import Classifier

NAMES = ("cat", "dog", "owl")


class Plain(nn.Module):
    """A network that no constructor of ours knows."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.side = nn.Linear(8, 8)
        self.fc = nn.Linear(8, num_classes)
        self.late = nn.Linear(5, 5)  # registered last, never applied

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.side(self.norm(self.conv(images)).mean(dim=(2, 3))))


def transformers_folder(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=24, patch_size=8,
        id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)},
    )  # fmt: skip
    network = ViTForImageClassification(config)
    nn.Module.to(network, dtype)
    network.save_pretrained(folder)
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "README.md").write_text("a card")
    return folder


def small(_: Path) -> ImageClassifier:
    return new_classifier("small-resnet", NAMES)


def wrapped(_: Path) -> ImageClassifier:
    return ImageClassifier(module=Plain(), class_names=NAMES)


def pretrained(folder: Path) -> ImageClassifier:
    return load_classifier(transformers_folder(folder))


def from_file(folder: Path) -> ImageClassifier:
    state = new_classifier("small-resnet", NAMES).module.state_dict()
    state = {f"module.{key}": value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_weights(folder / "net.pth", state, wrapper=("state_dict",))
    return load_classifier(folder / "net.pth", arch="small-resnet", class_names=NAMES)


KINDS = pytest.mark.parametrize("make", [small, wrapped, pretrained, from_file])
Make = Callable[[Path], ImageClassifier]


def images(classifier: ImageClassifier, count: int = 4) -> Tensor:
    size = classifier.image_size
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@KINDS
def test_it_is_a_classifier(make: Make, tmp_path: Path) -> None:
    classifier = make(tmp_path)
    assert isinstance(classifier, Classifier)
    assert classifier.class_names == NAMES
    assert classifier.logits(images(classifier)).shape == (4, 3)


@KINDS
def test_the_head_on_the_features_gives_the_logits_and_no_hook_stays(make: Make, tmp_path: Path) -> None:
    classifier = make(tmp_path)
    classifier.module.eval()
    batch = images(classifier)
    features = classifier.features(batch)
    assert features.ndim == 2
    torch.testing.assert_close(classifier.head()(features), classifier.logits(batch))
    for part in classifier.module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


@KINDS
def test_looking_for_the_head_changes_nothing(make: Make, tmp_path: Path) -> None:
    classifier = make(tmp_path)
    classifier.module.train()
    next(iter(classifier.module.children())).eval()
    modes = [part.training for part in classifier.module.modules()]
    before = hash_weights(classifier.module.state_dict())
    state = torch.random.get_rng_state()
    classifier.head()
    assert [part.training for part in classifier.module.modules()] == modes
    assert hash_weights(classifier.module.state_dict()) == before
    assert torch.equal(torch.random.get_rng_state(), state)


@KINDS
def test_training_a_copy_or_a_fresh_one_leaves_the_original(make: Make, tmp_path: Path) -> None:
    classifier = make(tmp_path)
    before = hash_weights(classifier.module.state_dict())
    for other in (classifier.copy(), classifier.fresh(1)):
        other.module.train()
        optimiser = torch.optim.SGD(other.module.parameters(), lr=0.1)
        other.logits(images(other)).square().sum().backward()
        optimiser.step()
        assert hash_weights(other.module.state_dict()) != before
        with torch.no_grad():
            for value in classifier.weights().values():
                value.zero_()
    assert hash_weights(classifier.module.state_dict()) == before
    assert all(parameter.grad is None for parameter in classifier.module.parameters())


@KINDS
def test_fresh_weights_follow_the_seed_alone(make: Make, tmp_path: Path) -> None:
    classifier = make(tmp_path)
    state = torch.random.get_rng_state()
    first = classifier.fresh(1)
    torch.rand(3)
    again, other = classifier.fresh(1), classifier.fresh(2)
    assert hash_weights(first.weights()) == hash_weights(again.weights()) != hash_weights(other.weights())
    torch.random.set_rng_state(state)
    classifier.fresh(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    drawn, own = dict(first.module.named_parameters()), dict(classifier.module.named_parameters())
    same = [key for key, value in own.items() if value.ndim > 1 and torch.equal(value, drawn[key])]
    # A ViT's class token starts at zero in this config of transformers; every other matrix must be new.
    assert all(not own[key].any() for key in same)


@KINDS
def test_the_normalisation_is_applied(make: Make, tmp_path: Path) -> None:
    classifier = make(tmp_path)
    classifier.module.eval()
    batch = images(classifier)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (classifier.mean, classifier.std))
    output = classifier.module((batch - mean) / std)
    expected = output if isinstance(output, Tensor) else output.logits
    torch.testing.assert_close(classifier.logits(batch), expected)


def test_the_head_is_the_layer_applied_last_not_the_one_named_last() -> None:
    classifier = ImageClassifier(module=Plain(), class_names=NAMES)
    assert classifier.head() is classifier.module.fc


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 32), nn.Flatten()), "no nn.Linear"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 3), nn.Softmax(1)), "is not the logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), r"expected logits of shape \(1, 3\), found shape \(1, 4\)"),
        (nn.Sequential(nn.Flatten(), nn.Identity(), nn.Unflatten(1, (3, 1024)), nn.Linear(1024, 1), nn.Flatten()),
         "is not the logits"),
    ],
)  # fmt: skip
def test_networks_without_a_head_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ImageClassifier(module=module, class_names=NAMES).head()


def test_parameters_that_nobody_draws_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.fc = nn.Linear(3072, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) * self.scale

    classifier = ImageClassifier(module=Odd(), class_names=NAMES)
    with pytest.raises(UnsupportedModelError, match=r"draws scale anew \(1 parameters\)"):
        classifier.fresh(0)


@pytest.mark.parametrize("given", [{"class_names": ()}, {"class_names": ("a", "a")}, {"std": (0.0, 1.0, 1.0)}])
def test_unusable_descriptions_are_refused(given: dict) -> None:
    with pytest.raises(UsageError):
        ImageClassifier(**({"module": Plain(), "class_names": NAMES} | given))


@KINDS
def test_what_was_saved_opens_as_the_same_model(make: Make, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    classifier = make(tmp_path / "in")
    classifier.module.eval()
    save_classifier(classifier, tmp_path / "out")
    save_classifier(classifier, tmp_path / "out")  # the same again is fine
    arch = None if classifier.architecture else f"{__name__}:Plain"
    again = load_classifier(tmp_path / "out") if arch is None else None
    if again is None:
        return
    assert again.class_names == classifier.class_names
    assert (again.mean, again.std, again.image_size) == (classifier.mean, classifier.std, classifier.image_size)
    assert hash_weights(again.weights()) == hash_weights(classifier.weights())
    torch.testing.assert_close(again.logits(images(again)), classifier.logits(images(classifier)))
    other = classifier.fresh(9)
    with pytest.raises(UsageError, match="holds something else"):
        save_classifier(other, tmp_path / "out")


def test_a_weights_file_goes_back_as_it_came(tmp_path: Path) -> None:
    classifier = from_file(tmp_path)
    save_classifier(classifier, tmp_path / "out")
    before, after = (torch.load(path / "net.pth", weights_only=True) for path in (tmp_path, tmp_path / "out"))
    assert before.keys() == after.keys() == {"state_dict"}
    before, after = before["state_dict"], after["state_dict"]
    assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
    assert hash_weights(before) == hash_weights(after)
    assert hash_weights(classifier.weights()) == hash_weights(before)


def test_counters_that_a_file_lacks_are_not_added(tmp_path: Path) -> None:
    state = new_classifier("small-resnet", NAMES).module.state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_weights(tmp_path / "net.safetensors", state)
    classifier = load_classifier(tmp_path / "net.safetensors", arch="small-resnet")
    assert classifier.class_names == ("0", "1", "2")
    assert classifier.weights().keys() == state.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_transformers_folder_goes_back_as_it_came(tmp_path: Path, dtype: torch.dtype) -> None:
    source = transformers_folder(tmp_path / "in", dtype=dtype)
    classifier = load_classifier(source)
    assert classifier.module.dtype == torch.float32
    assert classifier.class_names == NAMES
    assert (classifier.image_size, classifier.mean, classifier.std) == (24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    save_classifier(classifier, tmp_path / "out")
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "out"))
    assert hash_weights(before) == hash_weights(after)
    for name in ("config.json", "preprocessor_config.json", "README.md"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_rescaling_of_a_processor_is_folded_in(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path)
    processor = {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5}
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    classifier = load_classifier(source)
    assert classifier.mean == pytest.approx((0.5, 0.5, 0.5))
    assert classifier.std == pytest.approx((0.5, 0.5, 0.5))


def test_remote_code_is_refused(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path)
    config = json.loads((source / "config.json").read_text())
    for extra in ({"auto_map": {"AutoConfig": "evil.Config"}}, {"sub": [{"_attn_implementation": "evil/kernel"}]}):
        (source / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(UnsafeCheckpointError, match="asks for code from elsewhere"):
            load_classifier(source)


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path / "in")
    shutil.move(source / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (source / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UnsafeCheckpointError, match="leads out of the folder"):
        load_classifier(source)


def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path)
    index = {"weight_map": {"a": "../../other.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeCheckpointError, match="leads out of the folder"):
        load_classifier(source)


def test_pickled_weights_of_a_folder_are_read_as_tensors(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path)
    whole = load_classifier(source).weights()
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    found = load_classifier(source)
    assert all(torch.equal(value, whole[key]) for key, value in found.weights().items())
    (source / "pytorch_model.bin").rename(source / "other.bin")
    with pytest.raises(UnsafeCheckpointError, match="pickle only"):
        load_classifier(source)


def edited(folder: Path, file: str, **changes: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_equal_class_names_get_their_number(tmp_path: Path) -> None:
    names = load_classifier(transformers_folder(tmp_path)).class_names
    labels = {str(place): "crane" if place < 2 else name for place, name in enumerate(names)}
    found = load_classifier(edited(tmp_path, "config.json", id2label=labels))
    assert found.class_names[:2] == ("crane", "crane (1)")


def test_labels_with_gaps_and_a_spread_of_nothing_are_errors_of_the_model(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path)
    plain = (source / "config.json").read_text()
    edited(source, "config.json", id2label={"0": "a", "7": "b"})
    with pytest.raises(ModelError):
        load_classifier(source)
    (source / "config.json").write_text(plain)
    (source / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.0] * 3}))
    with pytest.raises(ModelError, match="image_std"):
        load_classifier(source)


def test_a_base_model_without_a_head_is_a_mismatch(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path)
    state = {key: value for key, value in load_file(source / "model.safetensors").items() if "classifier" not in key}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatchError) as refused:
        load_classifier(source)
    assert refused.value.missing == ("classifier.bias", "classifier.weight")


def test_weights_that_are_not_finite_are_refused_in_folders_too(tmp_path: Path) -> None:
    source = transformers_folder(tmp_path)
    state = load_file(source / "model.safetensors")
    state["classifier.bias"] = torch.full((3,), float("nan"))
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN or infinite"):
        load_classifier(source)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "unpoison.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_cannot_name_code(tmp_path: Path) -> None:
    save_classifier(new_classifier("small-resnet", NAMES), tmp_path)
    edit(tmp_path, architecture="os:system")
    with pytest.raises(UnsafeCheckpointError, match="may name no code") as refused:
        load_classifier(tmp_path)
    assert "--arch" in refused.value.hint
    assert load_classifier(tmp_path, arch="small-resnet").class_names == NAMES


def test_damaged_descriptions_are_refused(tmp_path: Path) -> None:
    save_classifier(new_classifier("small-resnet", NAMES), tmp_path)
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    for changes, kind in [
        ({"weights": "../secret.safetensors"}, UnsafeCheckpointError),
        ({"schema_version": 99}, SchemaVersionError),
        ({"schema": "other"}, ModelError),
        ({"class_names": 3}, ModelError),
    ]:
        original = (tmp_path / "unpoison.json").read_bytes()
        edit(tmp_path, **changes)
        with pytest.raises(kind):
            load_classifier(tmp_path)
        (tmp_path / "unpoison.json").write_bytes(original)
    (tmp_path / "unpoison.json").write_text("[1")
    with pytest.raises(ModelError, match="not JSON"):
        load_classifier(tmp_path)


def test_folders_of_neither_kind_and_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        load_classifier(tmp_path)
    with pytest.raises(ModelError, match="no such model folder"):
        load_classifier(tmp_path / "absent")


def test_architectures_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnknownMethodError, match="no architecture named 'small-resent'") as refused:
        new_classifier("small-resent", NAMES)
    assert refused.value.closest == "small-resnet"
    save_weights(tmp_path / "net.safetensors", {"a.weight": torch.ones(3, 3)})
    with pytest.raises(UsageError, match="does not say which network"):
        load_classifier(tmp_path / "net.safetensors")
    with pytest.raises(CheckpointMismatchError, match=r"a\.weight"):
        load_classifier(tmp_path / "net.safetensors", arch="small-resnet")


SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3072, num_classes)
    def forward(self, x):
        return self.fc(x.flatten(1))

def three():
    return Net(3)

def positional(count):
    return Net(count)

def keywords(**options):
    return Net(**options)

def fixed():
    net = Net(3)
    with torch.no_grad():
        net.fc.weight.copy_(torch.arange(3 * 3072).view(3, 3072))
    return net

def two(a, b):
    return Net(3)

def nothing():
    return 1
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"network_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("name", ["Net", "three", "positional", "keywords", "fixed"])
def test_own_code_by_import_path(own_code: str, name: str, tmp_path: Path) -> None:
    classifier = new_classifier(f"{own_code}:{name}", NAMES)
    assert classifier.head().out_features == 3
    # One that loads its weights instead of drawing them is drawn anew all the same.
    assert hash_weights(classifier.fresh(1).weights()) != hash_weights(classifier.fresh(2).weights())
    save_classifier(classifier, tmp_path / "out")
    assert hash_weights(read_weights(tmp_path / "out" / "model.safetensors")) == hash_weights(classifier.weights())
    again = load_classifier(tmp_path / "out", arch=f"{own_code}:{name}")
    assert hash_weights(again.weights()) == hash_weights(classifier.weights())
    with pytest.raises(UnsafeCheckpointError):
        load_classifier(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "has no attribute"), ("two", "it needs a, b"), ("nothing", "it gave int")],
)
def test_own_code_that_does_not_serve(own_code: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        new_classifier(f"{own_code}:{name}", NAMES)
    with pytest.raises(UsageError, match="No module named"):
        new_classifier("no_such_package_at_all:Net", NAMES)
