"""Hostile, damaged and published weights files."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unpoison.errors import CheckpointMismatchError, ModelError, UnsafeCheckpointError, UsageError
from unpoison.models.checkpoints import (
    hash_weights,
    load_into,
    normalise_keys,
    read_checkpoint,
    read_weights,
    save_weights,
)
from unpoison.models.networks import build_network


class Touch:
    """Unpickled with code, this makes the canary file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.canary}'",)


def weights() -> dict[str, Tensor]:
    return {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.zeros(3)}


def zip_with(path: Path, entries: dict[str, bytes], *, root: str = "archive", compress: bool = False) -> Path:
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(f"{root}/{name}", data)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".ckpt"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_pickle_is_named_and_never_runs(tmp_path: Path, suffix: str, protocol: int, zipped: bool) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps({"state_dict": {"a": Touch(canary)}}, protocol=protocol)
    pickle.loads(data)  # noqa: S301 # the canary works
    assert canary.exists()
    canary.unlink()
    path = tmp_path / f"model{suffix}"
    if zipped:
        zip_with(path, {"data.pkl": data, "version": b"3\n"})
    else:
        path.write_bytes(data)
    with pytest.raises(UnsafeCheckpointError, match=r"system.*Nothing of it was executed") as refused:
        read_weights(path)
    assert not canary.exists()
    assert "safetensors" in refused.value.hint


def test_code_through_an_old_opcode_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "model.pth"
    path.write_bytes(f"(S'touch {canary}'\nios\nsystem\n.".encode())
    with pytest.raises(UnsafeCheckpointError, match=r"os\.system"):
        read_weights(path)
    assert not canary.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UnsafeCheckpointError, match="Linear"):
        read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize("entry", ["code/__torch__.py", "constants.pkl"])
def test_torchscript_archives_are_refused(tmp_path: Path, entry: str) -> None:
    path = zip_with(tmp_path / "scripted.pt", {"data.pkl": pickle.dumps({}, protocol=2), entry: b""})
    with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
        read_weights(path)


def test_a_file_named_code_is_no_torchscript(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "code.pth")
    assert read_weights(tmp_path / "code.pth").keys() == weights().keys()


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "bomb.pth", {"data.pkl": b"\0" * 5_000_000}, compress=True)
    with pytest.raises(UnsafeCheckpointError, match="claim to hold"):
        read_weights(path)


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pth")
    with pytest.raises(UnsafeCheckpointError, match="claim tensors of"):
        read_weights(tmp_path / "wide.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.99])
def test_truncated_files_say_so(tmp_path: Path, suffix: str, share: float) -> None:
    whole = tmp_path / f"whole{suffix}"
    save_weights(whole, {"a": torch.randn(100, 100)})
    data = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"truncated|damaged|not a safetensors") as refused:
        read_weights(cut)
    assert refused.value.hint


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_other_files_are_no_checkpoints(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<html>Not found</html>" * 20)
    with pytest.raises(ModelError):
        read_weights(tmp_path / name)


def test_a_pickle_called_safetensors_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Touch(canary), protocol=2))
    with pytest.raises(UnsafeCheckpointError, match=r"ends in \.safetensors, but"):
        read_weights(path)
    torch.save(weights(), path)
    with pytest.raises(UnsafeCheckpointError, match=r"ends in \.safetensors, but"):
        read_weights(path)
    assert not canary.exists()


def test_oversize_headers_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + b"{}")
    with pytest.raises(UnsafeCheckpointError, match="header claims"):
        read_weights(path)


def test_a_header_that_lies_about_offsets_is_damage(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**9]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(ModelError, match="damaged"):
        read_weights(path)


def test_missing_files_and_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_weights(tmp_path / "absent.pth")
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(ModelError, match="expected a weights file"):
        read_weights(tmp_path / "model.h5")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    save_weights(tmp_path / "a.safetensors", {"good": torch.ones(2), "bad": torch.tensor([1.0, value], dtype=dtype)})
    with pytest.raises(ModelError, match="1 tensors hold NaN or infinite values, the first is 'bad'"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2)])
def test_what_is_no_dictionary_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="expected a dictionary of tensors"):
        read_weights(tmp_path / "a.pth")


def test_a_dictionary_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="no tensors were found under 'epoch'"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net"])
def test_wrappers_and_prefixes_are_taken_off(wrapper: str) -> None:
    content = {
        "epoch": 3,
        wrapper: OrderedDict({f"module.{key}": value for key, value in weights().items()} | {"n": 1}),
    }
    plain, path, prefix = normalise_keys(content)
    assert plain.keys() == weights().keys()
    assert (path, prefix) == ((wrapper,), "module.")


def test_a_prefix_that_some_keys_lack_stays() -> None:
    plain, path, prefix = normalise_keys({"module.a": torch.ones(1), "b": torch.ones(1)})
    assert plain.keys() == {"module.a", "b"}
    assert (path, prefix) == ((), "")


def test_legacy_files_are_read(tmp_path: Path) -> None:
    torch.save({"net": weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_checkpoint(tmp_path / "old.pth")
    assert found.wrapper == ("net",)
    torch.testing.assert_close(found.weights, weights())


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_saved_weights_come_back_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in weights().items()}
    state["view"] = state["layer.weight"][1:, ::2]
    save_weights(tmp_path / name, state)
    assert hash_weights(read_weights(tmp_path / name)) == hash_weights(state)


def test_saving_never_overwrites_other_content(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, weights())
    save_weights(path, weights())
    with pytest.raises(UsageError, match="holds something else"):
        save_weights(path, {"other": torch.ones(1)})
    assert read_weights(path).keys() == weights().keys()
    with pytest.raises(UsageError, match="suffix"):
        save_weights(tmp_path / "a.txt", weights())


def test_pickled_files_keep_their_wrapper(tmp_path: Path) -> None:
    save_weights(tmp_path / "a.pth", weights(), wrapper=("state_dict",))
    assert torch.load(tmp_path / "a.pth", weights_only=True).keys() == {"state_dict"}
    assert read_weights(tmp_path / "a.pth").keys() == weights().keys()


def test_hash_sees_names_dtypes_shapes_and_bytes_but_not_order_or_strides() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1)}
    same = {"b": torch.ones(1), "a": torch.arange(6.0).reshape(2, 3).t().contiguous().t()}
    assert hash_weights(base) == hash_weights(same)
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"] + 1e-6, "b": base["b"]},
    ]
    assert len({hash_weights(base), *map(hash_weights, others)}) == 5


def test_differences_are_listed_and_nothing_is_changed() -> None:
    module = build_network("small-resnet", 10, seed=0)
    state = dict(module.state_dict())
    before = hash_weights(state)
    wrong = {key: torch.zeros_like(value) for key, value in state.items()} | {"extra": torch.ones(1)}
    del wrong["stem.weight"]
    wrong["linear.bias"] = torch.ones(7)
    with pytest.raises(CheckpointMismatchError) as refused:
        load_into(module, wrong)
    assert refused.value.missing == ("stem.weight",)
    assert refused.value.unexpected == ("extra",)
    assert "linear.bias is (7,), expected (10,)" in refused.value.message
    assert "--arch" in refused.value.hint
    assert hash_weights(module.state_dict()) == before


def test_another_architecture_names_the_first_five_and_counts_the_rest() -> None:
    small, large = (build_network(name, 10, seed=0) for name in ("small-resnet", "preact-resnet-18"))
    with pytest.raises(CheckpointMismatchError, match=r"\d\d missing: (\S+, ){5}\.\.\.") as refused:
        load_into(large, small.state_dict())
    assert len(refused.value.missing) > 5


def test_step_counters_may_be_absent() -> None:
    source, target = (build_network("small-resnet", 10, seed=seed) for seed in (0, 1))
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    load_into(target, state)
    assert hash_weights(target.state_dict()) == hash_weights(source.state_dict())


def test_half_precision_weights_fill_a_float_module() -> None:
    module = nn.Linear(2, 2)
    load_into(module, {"weight": torch.full((2, 2), 0.5, dtype=torch.float16), "bias": torch.zeros(2).half()})
    assert module.weight.dtype == torch.float32
    assert module.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_foreign_safetensors_are_read(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors", metadata={"any": "thing"})
    assert hash_weights(read_weights(tmp_path / "a.safetensors")) == hash_weights(weights())


def test_archives_of_an_unusual_root_are_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(weights(), buffer)
    (tmp_path / "a.pth").write_bytes(buffer.getvalue())
    assert read_checkpoint(tmp_path / "a.pth").weights.keys() == weights().keys()


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "prefix", "count"),
    [("resnet20_cifar10_clean.th", "module.", 97), ("wrn16_1_cifar10_grid_target0.pth", "", 82)],
)
def test_published_checkpoints_open(shared: Path, name: str, prefix: str, count: int) -> None:
    found = read_checkpoint(shared / "models" / name)
    assert found.wrapper == ("state_dict",)
    assert found.prefix == prefix
    assert len(found.weights) == count
    assert "conv1.weight" in found.weights
