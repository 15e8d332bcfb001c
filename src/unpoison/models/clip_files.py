"""CLIPs from and to disk, whatever the format: transformers, open_clip, OpenAI-style weights."""

from __future__ import annotations

from pathlib import Path

from unpoison.models.clip_open_clip import OpenClip
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.models.folders import find_model_folder, read_json
from unpoison.models.open_clip_config import CONFIG_NAME
from unpoison.storage import write_atomically
from unpoison.types import ImageTextModel

_LIBRARIES: dict[type, str] = {TransformersCLIP: "transformers", OpenClip: "open_clip"}


def load_any_clip(model: str | Path = "tiny") -> ImageTextModel:
    """Open a CLIP: "tiny", a folder or hub id of transformers or of open_clip, ``open_clip:NAME/TAG``, a weights file.

    A folder that holds both formats opens as transformers', which needs no extra. Raises ModelError and its kinds,
    MissingExtraError where open_clip is needed and absent.
    """
    if model == "tiny":
        return load_clip()
    from unpoison.models.open_clip_files import PREFIX, load_open_clip

    if isinstance(model, str) and model.startswith(PREFIX):
        return load_open_clip(model)
    if Path(model).is_file():
        return load_open_clip(Path(model))
    folder = find_model_folder(model, pickles=True)
    if (folder / CONFIG_NAME).exists() and not _is_transformers(folder):
        return load_open_clip(folder)
    return load_clip(model)


def save_clip(clip: ImageTextModel, folder: Path, *, card: str | None = None) -> None:
    """Write ``clip`` as it was opened (same files, keys, types), and ``card`` as README.md.

    All of the model is written or nothing of it. Raises UsageError where that fails or another file is in the way,
    ModelError for weights that are not finite.
    """
    clip.save(folder)
    if card is not None:
        write_atomically(folder / "README.md", card.encode())


def library_of(clip: ImageTextModel) -> str:
    """Which library opens what :func:`save_clip` writes: "transformers", "open_clip", or "" for neither."""
    return next((name for kind, name in _LIBRARIES.items() if isinstance(clip, kind)), "")


def notes_on_saving(clip: ImageTextModel) -> tuple[str, ...]:
    """How what :func:`save_clip` writes differs from what was opened, beside the weights: sentences for people."""
    return clip.notes if isinstance(clip, TransformersCLIP) else ()


def _is_transformers(folder: Path) -> bool:
    config = folder / "config.json"
    weights = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model.bin"))
    return bool(weights) and config.exists() and read_json(config).get("model_type") == "clip"
