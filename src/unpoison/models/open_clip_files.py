"""open_clip's models from files: published weights, folders of the hub, training checkpoints, OpenAI-style weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unpoison.errors import CheckpointMismatchError, ModelError, UnsupportedModelError
from unpoison.models.checkpoints import Checkpoint, load_into, read_checkpoint
from unpoison.models.clip_open_clip import (
    WEIGHTS_NAME,
    OpenClip,
    build_network,
    config_file,
    import_open_clip,
    side_of,
)
from unpoison.models.clip_origin import ClipOrigin, companions_of, describe_checkpoint, fit_shapes
from unpoison.models.folders import check_model_folder, file_inside, read_json
from unpoison.models.open_clip_config import CONFIG_NAME, check_config, check_keys, infer_config, preprocessing_of

PREFIX = "open_clip:"
_KNOWN_NAMES = (WEIGHTS_NAME, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def load_open_clip(model: str | Path) -> OpenClip:
    """Open ``open_clip:NAME/TAG`` (published weights), ``open_clip:NAME/PATH``, a folder or a weights file.

    A folder holds open_clip_config.json and one weights file; beside a single file that configuration counts too,
    else the architecture is read from the shapes (:func:`unpoison.models.open_clip_config.infer_config`).
    Raises MissingExtraError, ModelError and its kinds.
    """
    if isinstance(model, str) and model.startswith(PREFIX):
        return _open_named(model.removeprefix(PREFIX))
    path = Path(model)
    if path.is_dir():
        check_model_folder(path, pickles=True)
        if not file_inside(path, CONFIG_NAME).exists():
            raise ModelError(f"{path}: it has no {CONFIG_NAME}.", hint="Give the path of the weights file itself.")
        return _open_file(_weights_in(path), read_json(path / CONFIG_NAME), companions_of(path))
    beside = path.parent / CONFIG_NAME
    if path.is_file() and beside.is_file():
        file_inside(path.parent, CONFIG_NAME)
        return _open_file(path, read_json(beside), {CONFIG_NAME: beside.read_bytes()})
    return _open_file(path, None, {})


def locate_open_clip(model: str) -> Path:
    """The weights file that ``open_clip:NAME/TAG`` or ``open_clip:NAME/PATH`` means, fetched where it has to be.

    Raises MissingExtraError, ModelError, UnsupportedModelError.
    """
    return _find_named(model.removeprefix(PREFIX))[0]


def _open_named(name: str) -> OpenClip:
    path, config, settings = _find_named(name)
    body = {"model_cfg": config} if settings is None else {"model_cfg": config, "preprocess_cfg": settings}
    return _open_file(path, body, {})


def _find_named(name: str) -> tuple[Path, dict[str, Any], dict[str, Any] | None]:
    """The weights file of a name, its architecture, and how published weights want pictures prepared."""
    library = import_open_clip()
    architecture, _, source = name.partition("/")
    config = library.get_model_config(architecture) if architecture in library.list_models() else None
    if config is None or not source:
        raise UnsupportedModelError(
            f"{PREFIX}{name}: open_clip has no architecture {architecture!r}, or nothing follows it.",
            hint="Write open_clip:NAME/TAG or open_clip:NAME/PATH, as in open_clip:ViT-B-32/laion2b_s34b_b79k.",
        )
    published = library.pretrained.get_pretrained_cfg(architecture, source)
    if published:
        try:
            path = Path(library.pretrained.download_pretrained(published))
        except Exception as error:  # errors of several libraries for one thing: it is not to be had
            raise ModelError(
                f"{PREFIX}{name}: the weights could not be fetched ({type(error).__name__}: {error}).",
                hint="Check the network, or download the file and give open_clip:NAME/PATH.",
            ) from error
        # The architecture's own setting is not always that of the weights; open_clip itself only warns.
        config["quick_gelu"] = bool(published.get("quick_gelu", False))
        return path, config, published
    path = Path(source)
    if not path.is_file():
        tags = ", ".join(library.pretrained.list_pretrained_tags_by_model(architecture)) or "none"
        raise ModelError(
            f"{PREFIX}{name}: {source!r} is neither a file nor a tag of {architecture} ({tags}).",
            hint="Check the spelling.",
        )
    return path, config, None


def _open_file(path: Path, body: Mapping[str, Any] | None, companions: dict[str, bytes]) -> OpenClip:
    checkpoint = read_checkpoint(path)
    check_keys(checkpoint.weights, name=str(path))
    file, weights = describe_checkpoint(checkpoint)
    if body is None:
        config, settings = infer_config(checkpoint.weights), {}
    else:
        config, settings = body.get("model_cfg", body), body.get("preprocess_cfg") or {}
    if not isinstance(config, Mapping) or not isinstance(settings, Mapping):
        raise ModelError(f"{CONFIG_NAME} beside {path}: damaged.", hint="Fetch the file again from the publisher.")
    check_config(config, name=str(path))
    _check_size(config, checkpoint, path)
    with torch.random.fork_rng(devices=[]):
        model = build_network(config, name=str(path))
    load_into(model, fit_shapes(weights, model.state_dict()))
    preprocessing = preprocessing_of(settings, side_of(model, str(path)))
    if CONFIG_NAME not in companions:
        companions = companions | config_file(config, preprocessing)
    return OpenClip(model.eval(), config, preprocessing, origin=ClipOrigin(files=(file,), companions=companions))


def _check_size(config: Mapping[str, Any], checkpoint: Checkpoint, path: Path) -> None:
    """A small file may claim an architecture larger than memory: compare before any is taken."""
    if config["vision_cfg"].get("timm_model_name"):
        return
    stored = sum(value.numel() for value in checkpoint.weights.values())
    layers = [config[part].get("layers", 12) for part in ("vision_cfg", "text_cfg")]
    deep = sum(sum(count) if isinstance(count, list) else count for count in layers)
    if deep <= len(checkpoint.weights):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            claimed = sum(value.numel() for value in build_network(config, name=str(path)).parameters())
        if claimed <= 2 * stored:
            return
    raise CheckpointMismatchError(
        f"{path}: {stored:,} numbers in {len(checkpoint.weights):,} tensors cannot fill the architecture that is "
        "claimed for them.",
        missing=[],
        unexpected=[],
        hint="Give the configuration that belongs to these weights.",
    )


def _weights_in(folder: Path) -> Path:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _SUFFIXES and entry.is_file())
    known = [name for name in _KNOWN_NAMES if name in names] or names
    if not known or (len(known) > 1 and known[0] not in _KNOWN_NAMES):
        raise ModelError(
            f"{folder}: expected one weights file beside {CONFIG_NAME}, found {', '.join(names) or 'none'}.",
            hint="Give the path of the weights file itself.",
        )
    return file_inside(folder, known[0])
