"""Pickles that would run code are refused under any name, protocol and wrapping, and nothing in them runs."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from unpoison.detection.model_files import judge_files
from unpoison.detection.pickle_code import follow_pickles
from unpoison.errors import ModelError
from unpoison.models.checkpoints import check_safetensors, read_weights

PROTOCOLS = (0, 1, 2, 4, 5)
WEIGHTS = {"layer.weight": torch.ones(4, 3), "layer.bias": torch.zeros(4)}


class Runs:
    """Unpickled by an ordinary loader, it writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def protocol_0(folder: Path, canary: Path) -> Path:
    (folder / "weights.pth").write_bytes(pickle.dumps({"state_dict": [1.0], "hook": Runs(canary)}, 0))
    return folder / "weights.pth"


def protocol_1(folder: Path, canary: Path) -> Path:
    (folder / "weights.bin").write_bytes(pickle.dumps({"state_dict": [1.0], "hook": Runs(canary)}, 1))
    return folder / "weights.bin"


def plain_pickle(folder: Path, canary: Path) -> Path:
    path = folder / "weights.pth"
    path.write_bytes(pickle.dumps({"state_dict": WEIGHTS, "hook": Runs(canary)}))
    return path


def torch_archive(folder: Path, canary: Path) -> Path:
    torch.save({"state_dict": WEIGHTS, "hook": Runs(canary)}, folder / "weights.pt")
    return folder / "weights.pt"


def second_pickle(folder: Path, canary: Path) -> Path:
    """Harmless at first sight: the code is in another pickle of the archive."""
    path = folder / "weights.bin"
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights/extra.pkl", pickle.dumps(Runs(canary)))
    return path


def damaged_opcodes(folder: Path, canary: Path) -> Path:
    """The code comes before opcodes that no reader understands."""
    path = folder / "weights.ckpt"
    path.write_bytes(pickle.dumps(Runs(canary))[:-1] + b"\xff\xff\xff")
    return path


def pickle_named_safetensors(folder: Path, canary: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Runs(canary), protocol=2))
    return path


def honest_folder(home: Path) -> Path:
    folder = home / "model"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    return folder


def zipped(folder: Path, canary: Path, protocol: int) -> Path:
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("deep/notes.md", "# nothing")
        archive.writestr("deep/state.pkl", pickle.dumps(Runs(canary), protocol))
    return folder / "more.zip"


def arrays(folder: Path, canary: Path, protocol: int) -> Path:
    with zipfile.ZipFile(folder / "more.npz", "w") as archive:
        archive.writestr("a.npy", array(folder, canary, protocol).read_bytes())
    (folder / "more.npy").unlink()
    return folder / "more.npz"


def array(folder: Path, canary: Path, protocol: int) -> Path:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    (folder / "more.npy").write_bytes(buffer.getvalue() + pickle.dumps(Runs(canary), protocol))
    return folder / "more.npy"


def packed(folder: Path, canary: Path, protocol: int) -> Path:
    (folder / "more.joblib").write_bytes(gzip.compress(pickle.dumps(Runs(canary), protocol)))
    return folder / "more.joblib"


def behind_weights(folder: Path, canary: Path, protocol: int) -> Path:
    """In an archive of honest weights, without a pickle's name."""
    torch.save(WEIGHTS, folder / "more.bin")
    with zipfile.ZipFile(folder / "more.bin", "a") as archive:
        archive.writestr("more/extra", pickle.dumps(Runs(canary), protocol))
    return folder / "more.bin"


def before_an_archive(folder: Path, canary: Path, protocol: int) -> Path:
    """torch looks at the first bytes, a zip reader at the last ones."""
    torch.save(WEIGHTS, folder / "more.pt")
    (folder / "more.pt").write_bytes(pickle.dumps(Runs(canary), protocol) + (folder / "more.pt").read_bytes())
    return folder / "more.pt"


def after_a_pickle(folder: Path, canary: Path, protocol: int) -> Path:
    (folder / "more.dat").write_bytes(pickle.dumps([1], protocol) + pickle.dumps(Runs(canary), protocol))
    return folder / "more.dat"


def cut(folder: Path, canary: Path, protocol: int) -> Path:
    """A loader has run it before it comes to the break."""
    (folder / "more.dat").write_bytes(pickle.dumps((Runs(canary), "x" * 100), protocol)[:-50])
    return folder / "more.dat"


@pytest.mark.parametrize(
    "make",
    [plain_pickle, protocol_0, protocol_1, torch_archive, second_pickle, damaged_opcodes, pickle_named_safetensors],
)
def test_what_would_run_code_is_refused_and_does_not_run(make: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = make(tmp_path, canary)
    verdict = judge_files(path)
    assert verdict.word == "refused"
    assert verdict.dangerous
    assert verdict.findings[0].kind in ("code", "malformed")
    assert not canary.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_canary_is_real(protocol: int, tmp_path: Path) -> None:
    """An ordinary loader does run it: the tests above would see that."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Runs(canary), protocol))  # noqa: S301 # our own, to know that it works
    assert canary.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["p.pkl", "p.pickle", "p.joblib", "p.dill", "p.dat", "p", "p.txt", "p.json", "p.py",
                                  "p.pth", "p.bin", "p.onnx", "p.pkl.old"])  # fmt: skip
def test_a_pickle_of_any_protocol_under_any_name(name: str, protocol: int, tmp_path: Path) -> None:
    folder, canary = honest_folder(tmp_path), tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Runs(canary), protocol))
    verdict = judge_files(folder)
    assert (verdict.word, [finding.kind for finding in verdict.findings]) == ("refused", ["code"])
    assert [found.name for found in verdict.files if found.can_run_code] == [name]
    assert judge_files(folder / name).dangerous
    assert not canary.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "make", [zipped, arrays, array, packed, behind_weights, before_an_archive, after_a_pickle, cut]
)
def test_a_pickle_within_something_else(make: Callable[[Path, Path, int], Path], protocol: int, tmp_path: Path) -> None:
    folder, canary = honest_folder(tmp_path), tmp_path / "canary"
    made = make(folder, canary, protocol)
    verdict = judge_files(folder)
    assert (verdict.word, [finding.file for finding in verdict.findings]) == ("refused", [made.name]), verdict.reason
    assert verdict.findings[0].kind == "code"
    assert not canary.exists()


def test_code_after_more_than_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unpoison.detection.pickle_files.MAX_PICKLE_BYTES", 1000)
    folder, canary = honest_folder(tmp_path), tmp_path / "canary"
    (folder / "p.dat").write_bytes(pickle.dumps((b"0" * 5000, Runs(canary))))
    verdict = judge_files(folder)
    assert (verdict.word, verdict.findings[0].kind) == ("refused", "malformed")
    assert "more than 1,000 bytes" in verdict.reason


@pytest.mark.parametrize(
    ("name", "text"),
    [("classes.txt", b"cat\ndog\nfrog\n"), ("names.txt", b"cat\ndog\nRobin\nbird\n"), ("README.md", b"# a model\n"),
     ("vocab.json", b'{"a": 1}'), ("merges.txt", b"#version: 0.2\ni n\nt h\n"), ("empty.txt", b""),
     ("notes.txt", b"class names\nof the model.\n"), ("plain.pkl", pickle.dumps({"accuracy": [1.0]}, 0)),
     ("numbers.dat", bytes(range(256)))],
)  # fmt: skip
def test_what_only_resembles_code_is_no_finding(name: str, text: bytes, tmp_path: Path) -> None:
    folder = honest_folder(tmp_path)
    (folder / name).write_bytes(text)
    verdict = judge_files(folder)
    assert verdict.word == "accepted", verdict.reason
    assert not any(found.can_run_code for found in verdict.files)


def test_arrays_without_code_are_no_finding(tmp_path: Path) -> None:
    folder = honest_folder(tmp_path)
    np.save(folder / "numbers.npy", np.arange(5.0))
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (5L,), }".ljust(117) + b"\n"  # as Python 2 wrote them
    (folder / "old.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(40))
    np.savez(folder / "several.npz", a=np.arange(5.0), b=np.array(["a", None], dtype=object))
    assert judge_files(folder).word == "accepted"


def lfs_pointer() -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 605157884\n"


def cut_archive() -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    return buffer.getvalue()[:-300]


def cut_legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()[:150]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("model.pth", cut_archive(), "without the directory"), ("model.bin", cut_legacy(), "truncated"),
        ("model.bin", cut_legacy()[:10], "breaks off"), ("model.bin", lfs_pointer(), "git lfs pull"),
        ("model.safetensors", lfs_pointer(), "git lfs pull"), ("model.bin", save(WEIGHTS), "rename it to model.safe"),
        ("model.pt", b"", "empty"), ("model.pt", b"<!DOCTYPE html><html>", "not a pickle"),
    ],
)  # fmt: skip
def test_damage_is_not_called_code(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    verdict = judge_files(tmp_path / name)
    assert (verdict.word, verdict.dangerous) == ("refused", False), verdict.reason
    assert [(finding.kind, said in finding.reason) for finding in verdict.findings] == [("unusable", True)]
    assert not any(found.can_run_code for found in verdict.files)


def test_a_pointer_is_told_apart_wherever_weights_are_read(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin"):
        (tmp_path / name).write_bytes(lfs_pointer())
        with pytest.raises(ModelError, match="Git LFS pointer"):
            read_weights(tmp_path / name)
    with pytest.raises(ModelError, match="Git LFS pointer"):
        check_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("count", [40, 46, 48, 88, 141])
def test_old_torch_files_are_not_read_past_their_pickles(count: int, tmp_path: Path) -> None:
    """Raw numbers follow, and how many of them there are can look like an opcode."""
    torch.save({"a": torch.ones(count)}, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    verdict = judge_files(tmp_path / "model.pth")
    assert verdict.word == "accepted", verdict.reason


def test_code_in_a_file_that_no_loader_of_ours_reads_is_found(tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    (folder / "deeper").mkdir()
    plain_pickle(folder / "deeper", canary)
    verdict = judge_files(folder)
    assert (verdict.word, verdict.findings[0].file) == ("refused", "deeper/weights.pth")
    assert [found.name for found in verdict.files if found.can_run_code] == ["deeper/weights.pth"]
    assert not canary.exists()


def test_numbers_that_are_not_finite_in_a_pickle(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.full((2, 2), float("inf"))}, tmp_path / "weights.pt")
    verdict = judge_files(tmp_path / "weights.pt")
    assert (verdict.word, verdict.dangerous) == ("refused", False)
    assert "infinite" in verdict.reason


def test_a_pickle_that_reaches_for_a_method_is_seen() -> None:
    """Not a name on any list, but an attribute of what was imported."""
    code = b"c__builtin__\ngetattr\n(c__builtin__\n__import__\nS'__call__'\ntR."
    assert follow_pickles(code).unsafe
