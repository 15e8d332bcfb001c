"""CLIPs to disk and back: the format they came in, whole or not at all, and what is said where that cannot be."""

import importlib.util
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unpoison.api_models import files_of
from unpoison.detection.model_files import judge_files
from unpoison.errors import (
    CheckpointMismatchError,
    MissingExtraError,
    ModelError,
    UnsafeCheckpointError,
    UnsupportedModelError,
    UsageError,
)
from unpoison.models.clip_files import library_of, load_any_clip, notes_on_saving, save_clip
from unpoison.models.clip_transformers import TransformersCLIP
from unpoison.models.folders import find_model_folder
from unpoison.models.open_clip_config import CONFIG_NAME

TEXTS = ["a cat", "an owl"]


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_folder, tmp_path / "given"))


def trained(folder: Path) -> TransformersCLIP:
    """The folder's model after one step of something, so that what is saved is not what was given."""
    clip = load_any_clip(folder)
    assert isinstance(clip, TransformersCLIP)
    with torch.no_grad():
        for _, value in (*clip.tower("image"), *clip.tower("text")):
            value.mul_(0.9)
    return clip


def stored(path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {key: (value.dtype, value.shape) for key, value in load_file(path).items()}


def assert_opens_with_the_library(folder: Path, clip: TransformersCLIP, tolerance: float = 1e-5) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = model(**tokens, pixel_values=clip.preprocessing.normalized(images))
    torch.testing.assert_close(output.image_embeds, clip.encode_images(images), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(output.text_embeds, clip.encode_texts(TEXTS), atol=tolerance, rtol=tolerance)


def test_a_saved_folder_opens_with_the_library_and_gives_the_same_embeddings(folder: Path, tmp_path: Path) -> None:
    clip = trained(folder)
    names = {path.name for path in folder.iterdir()}
    shutil.rmtree(folder)  # what is needed to save was read when the model was opened
    save_clip(clip, tmp_path / "out", card="# Purified")
    assert_opens_with_the_library(tmp_path / "out", clip)
    again = load_any_clip(tmp_path / "out")
    assert again.fingerprint == clip.fingerprint
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md"}
    assert (tmp_path / "out" / "README.md").read_text() == "# Purified"
    save_clip(clip, tmp_path / "out", card="# Purified")  # a repeated command finds its own files


def test_half_precision_stays_half_precision_on_disk(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    state = {key: value.half() if value.ndim == 2 else value for key, value in load_file(path).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(40)[None]  # older files hold it
    save_file(state, path, {"format": "pt"})
    expected = stored(path)
    clip = trained(folder)
    assert {value.dtype for value in clip.module.parameters()} == {torch.float32}
    save_clip(clip, tmp_path / "out")
    assert stored(tmp_path / "out" / "model.safetensors") == expected
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("text_model.embeddings.position_ids"), torch.arange(40)[None])
    assert_opens_with_the_library(tmp_path / "out", clip, tolerance=5e-3)


def test_weights_in_several_files_come_back_in_the_same_files(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for name, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    clip = trained(folder)
    save_clip(clip, tmp_path / "out")
    for name in halves:
        assert stored(tmp_path / "out" / name) == stored(folder / name)
    assert_opens_with_the_library(tmp_path / "out", clip)


def test_a_pickled_folder_is_read_as_tensors_and_written_as_it_was(folder: Path, tmp_path: Path) -> None:
    state: dict[str, Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    clip = trained(folder)
    save_clip(clip, tmp_path / "out")
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert list(written) == list(state)
    assert_opens_with_the_library(tmp_path / "out", clip)
    torch.save({key: value for key, value in state.items() if "visual_projection" not in key}, folder / "x.bin")
    (folder / "x.bin").replace(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointMismatchError, match="visual_projection"):
        load_any_clip(folder)


def test_of_a_folder_for_two_libraries_only_what_was_opened_is_written(folder: Path, tmp_path: Path) -> None:
    (folder / CONFIG_NAME).write_text("{}")
    clip = trained(folder)
    assert library_of(clip) == "transformers"
    assert [CONFIG_NAME in note for note in notes_on_saving(clip)] == [True]
    assert notes_on_saving(clip.copy()) == notes_on_saving(clip)
    save_clip(clip, tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG_NAME).exists()
    assert_opens_with_the_library(tmp_path / "out", clip)
    assert notes_on_saving(load_any_clip(tmp_path / "out")) == ()


def test_weights_that_the_library_renames_are_said_to_come_back_under_its_names(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    save_file({f"clip.{key}": value.half() for key, value in load_file(path).items()}, path, {"format": "pt"})
    clip = trained(folder)
    assert ["other keys" in note for note in notes_on_saving(clip)] == [True]
    save_clip(clip, tmp_path / "out")
    assert not any(key.startswith("clip.") for key in stored(tmp_path / "out" / "model.safetensors"))
    assert_opens_with_the_library(tmp_path / "out", clip)


def snapshots_of(repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has ``repository`` as one/clip, in the layout of the hub's cache; gives back what is fetched."""
    fetched: list[str] = []

    def snapshot_download(model: str, *, allow_patterns: list[str]) -> str:
        assert model == "one/clip"
        snapshot, blobs = cache / "models--one--clip/snapshots/abc", cache / "models--one--clip/blobs"
        for place in (snapshot, blobs):
            place.mkdir(parents=True, exist_ok=True)
        for file in sorted(repository.iterdir()):
            if any(file.match(pattern) for pattern in allow_patterns) and not (snapshot / file.name).exists():
                fetched.append(file.name)
                shutil.copy(file, blobs / file.name)
                (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


def test_of_the_hub_pickled_weights_are_fetched_where_there_are_no_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save({"other": torch.zeros(1)}, folder / "training_args.bin")
    given = load_any_clip(folder)
    fetched = snapshots_of(folder, tmp_path / "both", monkeypatch)
    assert load_any_clip("one/clip").fingerprint == given.fingerprint
    assert "model.safetensors" in fetched
    assert not any(name.endswith(".bin") for name in fetched)
    (folder / "model.safetensors").unlink()
    fetched = snapshots_of(folder, tmp_path / "pickled", monkeypatch)
    clip = load_any_clip("one/clip")
    torch.testing.assert_close(clip.encode_texts(TEXTS), given.encode_texts(TEXTS), rtol=0, atol=0)
    assert [name for name in fetched if name.endswith(".bin")] == ["pytorch_model.bin"]
    assert judge_files(files_of("one/clip")).word == "accepted"
    save_clip(clip, tmp_path / "out")
    assert torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True).keys() == weights.keys()


def test_a_pickle_of_the_hub_that_runs_code_is_not_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Runs()}, folder / "pytorch_model.bin")
    snapshots_of(folder, tmp_path / "hub", monkeypatch)
    with pytest.raises(UnsafeCheckpointError):
        load_any_clip("one/clip")
    assert judge_files(files_of("one/clip")).word == "refused"
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_open_clip_are_fetched_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"weights")
    snapshots_of(folder, tmp_path / "hub", monkeypatch)
    assert not (find_model_folder("one/clip") / "open_clip_pytorch_model.bin").exists()
    assert (find_model_folder("one/clip", pickles=True) / "open_clip_pytorch_model.bin").read_bytes() == b"weights"


def test_a_model_made_in_memory_is_saved_as_the_library_does(clip_folder: Path, tmp_path: Path) -> None:
    opened = trained(clip_folder)
    clip = TransformersCLIP(opened._model, opened._tokenizer, opened.preprocessing)
    clip.encode_texts(["changes", "the padding of the tokenizer"])
    save_clip(clip, tmp_path / "out")
    assert_opens_with_the_library(tmp_path / "out", clip)
    assert load_any_clip(tmp_path / "out").fingerprint == opened.fingerprint


def test_nothing_of_the_user_s_is_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"config\.json exists"):
        save_clip(trained(folder), out)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "mine"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond ``size`` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(folder: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    clip, other = trained(folder), tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for out in (tmp_path / "new", other):
        with largest_file(20_000), pytest.raises(UsageError, match="could not be written") as caught:
            save_clip(clip, out, card="# Purified")
        assert "room" in caught.value.hint
    assert not (tmp_path / "new").exists()
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    save_clip(clip, tmp_path / "new")
    assert load_any_clip(tmp_path / "new").fingerprint == clip.fingerprint


def test_weights_that_are_not_finite_are_never_saved(folder: Path, tmp_path: Path) -> None:
    clip = trained(folder)
    with torch.no_grad():
        clip.module.get_parameter("visual_projection.weight")[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"NaN.*visual_projection"):
        save_clip(clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_too_large_for_the_type_on_disk_is_said(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, path, {"format": "pt"})
    clip = trained(folder)
    with torch.no_grad():
        clip.module.get_parameter("visual_projection.weight")[0, 0] = 1e6
    with pytest.raises(ModelError, match="float16"):
        save_clip(clip, tmp_path / "out")


def test_a_torchscript_archive_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(UnsafeCheckpointError, match="TorchScript") as caught:
        load_any_clip(tmp_path / "clip.pt")
    assert "torch.jit.load" in caught.value.hint


def test_single_files_that_are_no_clip_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="format of transformers"):
        load_any_clip(folder / "model.safetensors")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedModelError, match=r"no weights of a CLIP.*fc\.weight"):
        load_any_clip(tmp_path / "x.pt")
    with pytest.raises(ModelError, match="no such model folder"):
        load_any_clip(tmp_path / "absent")


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is not None, reason="open_clip is installed")
def test_without_the_extra_a_model_of_open_clip_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError) as caught:
        load_any_clip("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert caught.value.hint == "pip install 'unpoison[open-clip]'"
    width, layers = 64, ("visual.transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.ln_1.weight")
    weights = {
        "visual.conv1.weight": torch.zeros(width, 3, 8, 8),
        "visual.positional_embedding": torch.zeros(5, width),
        "visual.proj": torch.zeros(width, 4),
        "token_embedding.weight": torch.zeros(49408, width, dtype=torch.float16),
        "positional_embedding": torch.zeros(16, width),
        "ln_final.weight": torch.zeros(width),
        "text_projection": torch.zeros(width, 4),
    }
    torch.save(weights | {key: torch.zeros(width) for key in layers}, tmp_path / "clip.pt")
    with pytest.raises(MissingExtraError):
        load_any_clip(tmp_path / "clip.pt")
