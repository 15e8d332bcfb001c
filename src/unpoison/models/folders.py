"""Model folders that nobody has vouched for: looked through before a library opens anything in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers.utils import logging

from unpoison.errors import CheckpointMismatchError, ModelError, UnsafeCheckpointError
from unpoison.models.checkpoints import check_finite, check_safetensors

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ASK_FOR_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")
_MAX_JSON_BYTES = 64 * 1024**2
_PATTERNS = ["*.json", "*.safetensors", "merges.txt", "vocab.txt"]
_PICKLED = ("pytorch_model.bin", "open_clip_pytorch_model.bin")


def check_model_folder(folder: Path, *, pickles: bool = False) -> None:
    """Refuse what could run code, fetch something else or read outside the folder; look at every weights header.

    ``pickles``: the caller reads pickled weights too, as tensors only.
    Raises UnsafeCheckpointError for links that leave the folder, for a config that asks for code of its own
    (``auto_map``, kernels from a hub), and for weights that exist as pickles only; ModelError for damage.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    for name in names:
        path = file_inside(folder, name)
        if path.suffix == ".safetensors":
            check_safetensors(path)
        elif path.suffix == ".json":
            check_config(path)
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled and not pickles and not any(name.endswith(".safetensors") for name in names):
        raise UnsafeCheckpointError(
            f"{folder}: the weights are a pickle only ({pickled[0]}). Nothing of it was loaded.",
            hint="Where you trust its author, save the model again with save_pretrained, which writes safetensors.",
        )


def file_inside(folder: Path, name: str) -> Path:
    """``folder / name``. Raises UnsafeCheckpointError for a name or a link that leads out of the folder.

    Links of the hub's cache layout (snapshots/REVISION -> blobs) stay inside the same model and are fine.
    """
    path = folder / name
    if name != Path(name).name or leads_out(folder, path):
        raise UnsafeCheckpointError(
            f"{folder}: {name!r} leads out of the folder, to {path.resolve()}.",
            hint="Replace the link by the file itself if you trust it.",
        )
    return path


def leads_out(folder: Path, path: Path) -> bool:
    """Whether ``path`` lies outside ``folder`` once links are followed; the hub's cache layout counts as inside."""
    real, home = path.resolve(), folder.resolve()
    cached = home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")
    return not (real.is_relative_to(home) or cached)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object of at most 64 MiB. Raises ModelError."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelError(f"{path}: larger than {_MAX_JSON_BYTES:,} bytes.", hint="This is no usual config file.")
    try:
        body = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: damaged, not JSON ({error}).", hint="Fetch the file again.") from error
    if not isinstance(body, dict):
        raise ModelError(f"{path}: expected an object, found {type(body).__name__}.", hint="Fetch the file again.")
    return body


def find_model_folder(model: str | Path, *, pickles: bool = False) -> Path:
    """The folder that ``model`` names, or the local snapshot of the hub id that it is. Raises ModelError.

    ``pickles``: where the hub has no safetensors of it, one pickled weights file is fetched, for a caller that reads
    such files as tensors only or looks at them without loading.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if isinstance(model, Path) or folder.exists() or not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model}: there is no such model folder.", hint="Give a folder or a hub id (OWNER/NAME).")
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(model, allow_patterns=_PATTERNS))
        for name in _PICKLED if pickles else ():
            if any(snapshot.glob("*.safetensors")) or any((snapshot / found).exists() for found in _PICKLED):
                break
            snapshot = Path(snapshot_download(model, allow_patterns=[*_PATTERNS, name]))
        return snapshot
    except Exception as error:  # the hub client raises errors of several libraries for one thing: it is not to be had
        raise ModelError(
            f"{model}: no such folder, and the hub could not give a model of this name ({type(error).__name__}).",
            hint="Check the spelling and the network, or download the model and give its folder.",
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading is over in a moment, and stderr belongs to the caller; transformers' setting is put back."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def open_pretrained(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """``kind.from_pretrained`` on a folder that :func:`check_model_folder` has passed, in float32, checked for gaps.

    Raises ModelError, CheckpointMismatchError.
    """
    try:
        with _no_progress_bar():
            module, report = kind.from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ModelError(
            f"{folder}: transformers cannot open it as {kind.__name__} ({reason}).",
            hint="Give a model of that kind, saved with save_pretrained as safetensors.",
        ) from error
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    shapes = [str(entry) for entry in report["mismatched_keys"]]
    if missing or unexpected or shapes:
        raise CheckpointMismatchError(
            f"{folder}: the weights do not fit config.json: {len(missing)} missing {missing[:5]}, "
            f"{len(unexpected)} unexpected {unexpected[:5]}, {len(shapes)} of another shape {shapes[:5]}.",
            missing=missing,
            unexpected=unexpected,
            hint="Give the folder of the fine-tuned model, not that of its base model.",
        )
    check_finite(module.state_dict(), name=str(folder))
    return module


def check_config(path: Path) -> None:
    """Refuse a JSON file of a model that asks for code from elsewhere, or for weights outside its folder.

    Raises UnsafeCheckpointError; ModelError where it is damaged or no object.
    """
    body = read_json(path)
    stack: list[Any] = [body]
    while stack:
        entry = stack.pop()
        if isinstance(entry, list):
            stack.extend(entry)
        elif isinstance(entry, dict):
            for key in _ASK_FOR_CODE:
                if entry.get(key):
                    _refuse(path, key)
            for key, value in entry.items():
                # A name with a slash makes transformers fetch a compiled kernel of that name and run it.
                if str(key).endswith("attn_implementation") and "/" in str(value):
                    _refuse(path, str(key))
            stack.extend(entry.values())
    weight_map = body.get("weight_map", {}) if path.name.endswith(".index.json") else {}
    for name in set(weight_map.values()) if isinstance(weight_map, dict) else ():
        file_inside(path.parent, str(name))


def _refuse(path: Path, key: str) -> None:
    raise UnsafeCheckpointError(
        f"{path}: {key} asks for code from elsewhere, so nothing was loaded.",
        hint="Use a model of a built-in architecture, or wrap the network yourself in Python.",
    )
