"""Classifiers from and to disk: our folder, a transformers folder, or a weights file with its architecture."""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from unpoison.errors import (
    ModelError,
    SchemaVersionError,
    UnknownMethodError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    UsageError,
)
from unpoison.models.checkpoints import Checkpoint, load_into, read_checkpoint, save_weights, write_new
from unpoison.models.folders import check_model_folder, file_inside, find_model_folder, open_pretrained, read_json
from unpoison.models.image_classifier import BOUNDS, MEAN, STD, ImageClassifier, Origin, channels_last, check_names
from unpoison.models.networks import ARCHITECTURES, build_network

__all__ = ["ImageClassifier", "check_architecture", "load_classifier", "new_classifier", "save_classifier"]

DESCRIPTION = "unpoison.json"
SCHEMA, SCHEMA_VERSION = "unpoison/classifier", 1
BOUNDS_FILE = "activation_bounds.safetensors"
PICKLED = "pytorch_model.bin"
"""Weights of a transformers folder of before safetensors, read as tensors only."""
_GIVE_ARCH = (
    f"Give the architecture with --arch: {', '.join(ARCHITECTURES)}, or package.module:callable of your own code."
)
Channels = tuple[float, float, float]


def new_classifier(
    arch: str,
    class_names: Sequence[str],
    *,
    image_size: int = 32,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageClassifier:
    """A newly drawn network of ``arch``. Raises UnknownMethodError, UsageError."""
    names = tuple(class_names)
    build = _builder(arch, len(names))
    if arch in ARCHITECTURES:
        module = build_network(arch, len(names), seed=seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build()
    return ImageClassifier(
        module=channels_last(module),
        class_names=names,
        image_size=image_size,
        mean=_channels(mean, MEAN),
        std=_channels(std, STD),
        architecture=arch,
        build=build,
    )


def check_architecture(arch: str) -> None:
    """Raises UnknownMethodError, UsageError for what :func:`new_classifier` could not build."""
    _builder(arch, 2)


def load_classifier(
    model: str | Path,
    *,
    arch: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageClassifier:
    """Open a folder that unpoison wrote, an image-classification folder or id of transformers, or a weights file.

    ``arch`` is needed for a weights file: a name of ``ARCHITECTURES`` or "package.module:callable", which is the
    caller's own code; a checkpoint never names what is imported. What a folder says about names, size, mean and std
    holds unless given here; ``image_size`` counts for weights files only.
    Raises ModelError and its kinds, UnknownMethodError for ``arch``, UsageError.
    """
    path = Path(model)
    if path.is_file():
        if arch is None:
            raise UsageError(f"{path} is a weights file: it does not say which network it fits.", hint=_GIVE_ARCH)
        return _from_weights(read_checkpoint(path), arch, class_names, image_size, mean, std)
    folder = find_model_folder(model, pickles=True)
    if file_inside(folder, DESCRIPTION).exists():
        return _from_our_folder(folder, arch, class_names, mean, std)
    check_model_folder(folder, pickles=(folder / PICKLED).is_file())
    if (folder / "config.json").exists():
        return _from_transformers(folder, class_names, image_size, mean, std)
    raise ModelError(
        f"{folder}: found neither {DESCRIPTION} nor config.json.",
        hint="Give a folder that unpoison or save_pretrained wrote, or a weights file with --arch.",
    )


def save_classifier(classifier: ImageClassifier, folder: Path) -> None:
    """Write a classifier in the format it came in: same keys, same dtypes, same other files.

    Weights files and new networks get a description (unpoison.json) beside the weights, so that the folder opens
    by itself. No file of other content is overwritten. Raises UsageError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if classifier.origin.folder is not None:
        _save_transformers(classifier, classifier.origin.folder, folder)
        return
    description = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "architecture": classifier.architecture,
        "class_names": classifier.class_names,
        "image_size": classifier.image_size,
        "mean": classifier.mean,
        "std": classifier.std,
        "weights": classifier.origin.file_name,
    }
    save_weights(folder / classifier.origin.file_name, classifier.weights(), wrapper=classifier.origin.wrapper)
    write_new(folder / DESCRIPTION, msgspec.json.format(msgspec.json.encode(description), indent=2))


def _from_weights(
    checkpoint: Checkpoint,
    arch: str,
    class_names: Sequence[str] | None,
    image_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ImageClassifier:
    weights, bounds = _without_bounds(checkpoint.weights)
    names = check_names(class_names, _count_classes(weights))
    classifier = new_classifier(arch, names, image_size=image_size, mean=mean, std=std)
    load_into(classifier.module, weights)
    classifier.bounds = bounds
    classifier.origin = Origin(
        dtypes={key: value.dtype for key, value in weights.items()},
        prefix=checkpoint.prefix,
        wrapper=checkpoint.wrapper,
        file_name=checkpoint.file_name,
    )
    classifier.module.eval()
    return classifier


def _without_bounds(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """A network's own weights, and the bounds of its activations in their order. Raises ModelError."""
    keys = sorted(key for key in weights if key.startswith(BOUNDS))
    if any(weights[key].ndim != 1 or not weights[key].is_floating_point() for key in keys):
        raise ModelError(f"{keys[0]} and the like must be vectors of numbers.", hint="Save the model again.")
    own = {key: value for key, value in weights.items() if not key.startswith(BOUNDS)}
    return own, tuple(weights[key].float() for key in keys)


def _from_our_folder(
    folder: Path,
    arch: str | None,
    class_names: Sequence[str] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ImageClassifier:
    path = folder / DESCRIPTION
    body = read_json(path)
    if body.get("schema") != SCHEMA:
        raise ModelError(f"{path}: expected {SCHEMA}, found {body.get('schema')!r}.", hint="Save the model again.")
    if body.get("schema_version") != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path}: schema version {body.get('schema_version')}, this version reads {SCHEMA_VERSION}.",
            hint="Install the version that wrote the folder.",
        )
    try:
        found = msgspec.convert(body, _Description)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {error}.", hint="Save the model again.") from error
    if len(set(found.class_names)) != len(found.class_names) or not all(value > 0 for value in found.std):
        raise ModelError(f"{path}: expected distinct class names and std > 0.", hint="Save the model again.")
    if arch is None and found.architecture not in ARCHITECTURES:
        # Importing what a downloaded file names would run code of its choice.
        raise UnsafeCheckpointError(
            f"{path}: its architecture {found.architecture!r} is not built in, and a model folder may name no code.",
            hint=_GIVE_ARCH,
        )
    return _from_weights(
        read_checkpoint(file_inside(folder, found.weights)),
        arch or str(found.architecture),
        class_names or found.class_names,
        found.image_size,
        mean or found.mean,
        std or found.std,
    )


class _Description(msgspec.Struct, frozen=True):
    class_names: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels
    architecture: str | None = None
    weights: str = "model.safetensors"


def _from_transformers(
    folder: Path,
    class_names: Sequence[str] | None,
    image_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ImageClassifier:
    from transformers import AutoModelForImageClassification

    pickled = (folder / PICKLED).is_file() and not any(folder.glob("model*.safetensors"))
    module: Any = (_open_pickled if pickled else open_pretrained)(AutoModelForImageClassification, folder)
    config, processor = module.config, _processor(folder)
    names = class_names or _names_of(folder, config)
    size = processor.get("size", getattr(config, "image_size", image_size))
    size = processor.get("crop_size", size) if processor.get("do_center_crop") else size
    model_class, blank = type(module), config.to_dict()
    return ImageClassifier(
        module=channels_last(module.eval()),
        class_names=tuple(names),
        image_size=_side(size, image_size),
        mean=_channels(mean, processor["mean"]),
        std=_channels(std, processor["std"]),
        architecture=f"transformers:{model_class.__name__}",
        build=lambda: model_class(model_class.config_class.from_dict(blank)),
        origin=Origin(dtypes=_stored_dtypes(folder, module), folder=folder),
        bounds=_bounds_beside(folder),
    )


def _open_pickled(kind: Any, folder: Path) -> nn.Module:
    """:func:`open_pretrained` on the same tensors as safetensors, since it knows what the library renamed."""
    weights = read_checkpoint(file_inside(folder, PICKLED)).weights
    with tempfile.TemporaryDirectory(prefix="unpoison-") as scratch:
        save_weights(Path(scratch) / "model.safetensors", weights)
        (Path(scratch) / "config.json").write_bytes(file_inside(folder, "config.json").read_bytes())
        return open_pretrained(kind, Path(scratch))


def _names_of(folder: Path, config: Any) -> tuple[str, ...]:
    """A name for each output; of equal ones (ImageNet has two cranes) all but the first get their number.

    Raises ModelError.
    """
    missing = [index for index in range(config.num_labels) if index not in config.id2label]
    if missing:
        raise ModelError(
            f"{folder / 'config.json'}: id2label names {config.num_labels} classes, but not {missing[0]}.",
            hint="Mend the file: it needs a name for each output, from 0 on.",
        )
    names: dict[str, int] = {}
    for index in range(config.num_labels):
        name = str(config.id2label[index])
        while name in names:
            name = f"{name} ({index})"
        names[name] = index
    return tuple(names)


def _bounds_beside(folder: Path) -> tuple[Tensor, ...]:
    """Bounds of a transformers folder lie in a file of their own: its library would drop unknown keys."""
    path = folder / BOUNDS_FILE
    return _without_bounds(read_checkpoint(file_inside(folder, BOUNDS_FILE)).weights)[1] if path.exists() else ()


def _processor(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json with mean and std restated for images in [0, 1]."""
    path = folder / "preprocessor_config.json"
    found = read_json(path) if path.exists() else {}
    mean, std = (found.get("image_mean", MEAN), found.get("image_std", STD)) if path.exists() else (MEAN, STD)
    if found.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = 255 * (found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0)
    try:
        scaled = {"mean": tuple(x / factor for x in mean), "std": tuple(x / factor for x in std)}
    except (TypeError, ZeroDivisionError) as error:
        raise ModelError(f"{path}: image_mean or image_std is not usable ({error}).", hint="Mend the file.") from error
    if not all(0 < value < float("inf") for value in scaled["std"]):
        raise ModelError(f"{path}: expected image_std > 0, got {list(std)[:3]}.", hint="Mend the file.")
    return found | scaled


def _side(size: object, default: int) -> int:
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge", default))
    if isinstance(size, list | tuple) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else default


def _channels(given: Sequence[float] | None, default: Sequence[float]) -> Channels:
    values = tuple(float(value) for value in (default if given is None else given))
    values = values * 3 if len(values) == 1 else values
    if len(values) != 3:
        raise UsageError(f"expected one value for each of 3 channels, got {values}.", hint="Give three numbers.")
    return values


def _stored_dtypes(folder: Path, module: nn.Module) -> dict[str, torch.dtype]:
    """The types on disk where its keys are the module's own; keys that transformers renames take the common type."""
    from safetensors import safe_open

    stored: dict[str, torch.dtype] = {}
    for path in sorted(set(folder.glob("*.safetensors")) - {folder / BOUNDS_FILE}):
        with safe_open(path, framework="pt") as file:
            stored |= {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 # no mapping
    floats = [dtype for dtype in stored.values() if dtype.is_floating_point]
    common = max(set(floats), key=floats.count) if floats else torch.float32
    return {
        key: stored.get(key, common if value.is_floating_point() else value.dtype)
        for key, value in module.state_dict().items()
    }


def _save_transformers(classifier: ImageClassifier, source: Path, folder: Path) -> None:
    state: dict[str, Tensor] = replace(classifier, bounds=()).weights()
    if classifier.bounds:
        bounds = {f"{BOUNDS}{site:03d}": bound.float() for site, bound in enumerate(classifier.bounds)}
        save_weights(folder / BOUNDS_FILE, bounds)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".partial") as scratch:
        classifier.module.save_pretrained(scratch, state_dict=state)  # pyright: ignore[reportCallIssue] # a PreTrainedModel
        weights = {path.name: path for path in Path(scratch).iterdir() if "safetensors" in path.name}
        for name, path in sorted(weights.items()):
            write_new(folder / name, path.read_bytes())
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".txt", ".md") and not path.name.endswith(".index.json"):
            write_new(folder / path.name, file_inside(source, path.name).read_bytes())


def _count_classes(weights: Mapping[str, Tensor]) -> int:
    """Rows of the last matrix: the head comes last in every usual state dict."""
    matrices = [value for key, value in weights.items() if key.endswith("weight") and value.ndim == 2]
    if not matrices:
        raise UnsupportedModelError(
            "The weights hold no matrix that could be a classifier's head.", hint="Give the class names."
        )
    return len(matrices[-1])


def _builder(arch: str, num_classes: int) -> Callable[[], nn.Module]:
    if arch in ARCHITECTURES:
        return lambda: ARCHITECTURES[arch](num_classes)
    module_name, _, name = arch.partition(":")
    if not name:
        raise UnknownMethodError(arch, ARCHITECTURES, kind="architecture")
    # The caller's own file beside the command counts, but only after everything that is installed.
    sys.path.append(str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--arch {arch}: {error}.", hint="Give package.module:callable; the module must be importable here."
        ) from error
    finally:
        sys.path.pop()
    return lambda: _call(make, arch, num_classes)


def _call(make: Callable[..., object], arch: str, num_classes: int) -> nn.Module:
    parameters = list(inspect.signature(make).parameters.values())
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    named = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    others = [p.name for p in required if p.name != "num_classes"]
    if len(others) > (0 if named else 1):
        raise UsageError(
            f"--arch {arch}: it needs {', '.join(others)}, we give the number of classes only.",
            hint="Give a callable that takes num_classes or nothing.",
        )
    arguments = {"num_classes": num_classes} if named else {}
    module = make(num_classes) if required and not named else make(**arguments)
    if not isinstance(module, nn.Module):
        raise UsageError(f"--arch {arch}: it gave {type(module).__name__}, no nn.Module.", hint="Return the network.")
    return module
