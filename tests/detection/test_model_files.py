"""The file verdict: hostile and damaged files are refused, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unpoison.detection.model_files import RECOGNIZED, judge_files
from unpoison.errors import ModelError

WEIGHTS = {"layer.weight": torch.ones(4, 3), "layer.bias": torch.zeros(4)}


def write_header(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "said", "kind"),
    [
        ({"a": entry(0, 40)}, b"\0" * 16, "truncated", "unusable"),
        ({"a": entry(0, 16), "b": entry(8, 24)}, b"\0" * 24, "overlaps", "malformed"),
        ({"a": entry(0, 16, [2**40])}, b"\0" * 16, "by its shape", "malformed"),
        ({"a": entry(0, 16)}, b"\0" * 40, "belong to no tensor", "malformed"),
        ({"a": entry(8, 24)}, b"\0" * 24, "belong to no tensor", "malformed"),
        ({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16, "unknown type", "unusable"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, b"\0" * 16, "negative", "malformed"),
        ({"a": {"dtype": "F32"}}, b"", "header cannot be read", "unusable"),
        ({"a": entry(0, 8)}, struct.pack("<ff", 1.0, float("nan")), "NaN", "unusable"),
    ],
)
def test_safetensors_that_do_not_hold_what_they_claim(
    header: dict[str, Any], data: bytes, said: str, kind: str, tmp_path: Path
) -> None:
    verdict = judge_files(write_header(tmp_path / "model.safetensors", header, data))
    assert verdict.word == "refused"
    assert said in verdict.reason
    assert verdict.findings[0].kind == kind


def test_cut_short_at_every_place(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(0, len(whole), 7):
        path = tmp_path / "model.safetensors"
        path.write_bytes(whole[:length])
        assert judge_files(path).word == "refused", length


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", pickle.dumps({}))
        archive.writestr("weights/data/0", b"\0" * 30_000_000)
    verdict = judge_files(path)
    assert (verdict.word, verdict.findings[0].kind) == ("refused", "archive bomb")


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.safetensors"])
def test_a_link_out_of_the_folder(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(target)
    verdict = judge_files(folder)
    assert (verdict.word, verdict.findings[0].kind) == ("refused", "link")
    assert [found.name for found in verdict.files] == ["config.json"]  # what it points to was not opened


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}),
        ("config.json", {"trust_remote_code": True}),
        ("tokenizer_config.json", {"nested": [{"auto_map": {"AutoTokenizer": "evil--x.Y"}}]}),
        ("config.json", {"_attn_implementation": "evil/kernel"}),
    ],
)
def test_a_config_that_asks_for_remote_code(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "model").mkdir()
    save_file(WEIGHTS, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / name).write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    verdict = judge_files(tmp_path / "model")
    assert (verdict.word, verdict.findings[0].kind) == ("refused", "remote code")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [("model.gguf", b"GGUF\3\0\0\0"), ("model.h5", b"\x89HDF\r\n\x1a\n"), ("model.onnx", b"\x08\x07\x12"),
     ("notes.md", b"# a model"), ("thing.xyz", b"\0\1\2")],
)  # fmt: skip
def test_other_formats_are_not_recognized_and_the_list_is_given(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    verdict = judge_files(tmp_path / name)
    assert verdict.word == "not recognized"
    assert verdict.recognized == RECOGNIZED
    assert not verdict.findings


def test_a_folder_without_weights_is_not_recognized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert judge_files(tmp_path).word == "not recognized"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        judge_files(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.bin"])
def test_honest_weights_are_accepted(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save({"state_dict": WEIGHTS, "epoch": 3}, path, _use_new_zipfile_serialization=name.endswith(".pth"))
    verdict = judge_files(path)
    assert verdict.word == "accepted", verdict.reason
    assert len(verdict.sha256) == 64
    assert not any(found.can_run_code for found in verdict.files)
    assert judge_files(path) == verdict


def test_the_published_models_are_accepted(shared: Path) -> None:
    for name in ("wrn16_1_cifar10_grid_target0.pth", "resnet20_cifar10_clean.th"):
        assert judge_files(shared / "models" / name).word == "accepted"


def test_a_torchscript_archive_holds_code(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}))
        archive.writestr("model/code/__torch__.py", "def forward(self): ...")
    verdict = judge_files(path)
    assert (verdict.word, verdict.findings[0].kind, verdict.format) == ("refused", "code", "TorchScript archive")


@pytest.mark.parametrize("archived", [False, True])
def test_code_under_the_name_of_safetensors_is_seen(archived: bool, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.safetensors"

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {canary}",)

    if archived:
        torch.save({"hook": Runs()}, path)
    else:
        path.write_bytes(pickle.dumps({"hook": Runs()}))
    verdict = judge_files(path)
    assert verdict.word == "refused"
    assert "code" in {finding.kind for finding in verdict.findings}
    assert verdict.files[0].can_run_code
    assert not canary.exists()


def test_the_sentence_says_what_the_rows_say(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert "no code" in judge_files(tmp_path).reason
    (tmp_path / "modeling.py").write_text("import os\n")
    verdict = judge_files(tmp_path)
    assert verdict.word == "accepted"
    assert "code that no loader of ours runs (modeling.py)" in verdict.reason
    assert [found.name for found in verdict.files if found.can_run_code] == ["modeling.py"]
