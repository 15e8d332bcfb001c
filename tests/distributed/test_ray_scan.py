"""A labelled set scanned on a Ray cluster of two worker processes: the answer of one process, whatever is killed."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from PIL import Image

from unpoison.api import ScanOutcome, scan_dataset
from unpoison.cli import main
from unpoison.data.shapes import SHAPES_CLASSES, make_shapes
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses.cgd import CGDConfig
from unpoison.detection.cgd import SeparationConfig
from unpoison.distributed import scan
from unpoison.distributed.cluster import count_workers
from unpoison.distributed.parts import portable
from unpoison.distributed.scan import SCORER_SAMPLES, on_a_sample, scan_dataset_on_ray
from unpoison.errors import ResultError, SourceFormatError, UsageError
from unpoison.models.clip_transformers import load_clip
from unpoison.runs import Run, RunFolder, Silent
from unpoison.storage import read_table, write_table
from unpoison.types import ZeroShotModel

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Ray's own: sockets and processes that it leaves to the interpreter
    pytest.mark.usefixtures("one_thread"),
]
ROWS, PART = 330, 32
CONFIG = CGDConfig(separation=SeparationConfig(scorers=2, scorer_epochs=1, scorer_samples=200))


@dataclass(frozen=True)
class Logged(Silent):
    lines: list[str]

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with room for two workers."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield str(made.address)
    made.shutdown()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes in a parquet file; one image does not decode, and one row has no label."""
    world = make_shapes(ROWS, seed=5)
    encoded = []
    for pixels in world.images:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    encoded[70] = {"bytes": b"no picture", "path": None}
    labels: list[Any] = [SHAPES_CLASSES[label] for label in world.labels]
    labels[200] = None
    path = tmp_path_factory.mktemp("set") / "shapes.parquet"
    pq.write_table(pa.table({"image": encoded, "label": labels}), path)
    return path


@pytest.fixture(scope="module")
def source(file: Path) -> LabelledImages:
    return open_images(file)


@pytest.fixture(scope="module")
def clip() -> ZeroShotModel:
    return load_clip("tiny")


@pytest.fixture(scope="module")
def alone(source: LabelledImages, clip: ZeroShotModel) -> ScanOutcome:
    """The same scan in this process."""
    return scan_dataset(source, clip=clip, config=CONFIG, run=Run(accelerator=Accelerator(cpu=True)))


@pytest.fixture(scope="module")
def finished(
    cluster: str, source: LabelledImages, clip: ZeroShotModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ScanOutcome, list[int]]:
    """A scan on Ray, its folder, and the process that was killed: a worker, once the first part was there."""
    folder = tmp_path_factory.mktemp("run") / "scan"
    killed: list[int] = []

    def kill() -> None:
        while not list((folder / "parts").glob("*.parquet")):
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            if "MapWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)
                return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    outcome = on_ray(cluster, source, clip, folder)
    thread.join(timeout=10)
    return folder, outcome, killed


def on_ray(
    address: str, source: LabelledImages, clip: ZeroShotModel, folder: Path, lines: list[str] | None = None
) -> ScanOutcome:
    progress = Logged([] if lines is None else lines)
    run = Run(accelerator=Accelerator(cpu=True), folder=RunFolder.open(folder, {}), progress=progress)
    return scan_dataset_on_ray(source, clip=clip, address=address, config=CONFIG, run=run, part=PART)


def check_same(found: ScanOutcome, expected: ScanOutcome) -> None:
    """Losses but for the last bits of sums, and all that is said about the set."""
    assert found.scores.ids == expected.scores.ids
    assert found.scores.axes.keys() == expected.scores.axes.keys()
    for name, values in expected.scores.axes.items():
        np.testing.assert_allclose(found.scores.axes[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(found.split.region, expected.split.region)
    assert found.scores.skipped == expected.scores.skipped
    assert found.scores.details == expected.scores.details
    assert replace(found.scan, seconds=0.0) == replace(expected.scan, seconds=0.0)
    assert [sample["id"] for sample in found.samples] == [sample["id"] for sample in expected.samples]
    assert [sample["clip_label"] for sample in found.samples] == [s["clip_label"] for s in expected.samples]


def test_a_killed_worker_costs_nothing_and_the_answer_is_that_of_one_process(
    finished: tuple[Path, ScanOutcome, list[int]], alone: ScanOutcome
) -> None:
    folder, outcome, killed = finished
    assert len(killed) == 1
    check_same(outcome, alone)
    assert len(outcome.scores.skipped) == 2
    assert np.isnan(outcome.scores.suspicion).sum() == 1
    assert len(list((folder / "parts").glob("*.parquet"))) == -(-(ROWS - 1) // PART)


def test_parts_that_are_there_are_not_computed_again(
    cluster: str,
    source: LabelledImages,
    clip: ZeroShotModel,
    finished: tuple[Path, ScanOutcome, list[int]],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "scan"
    shutil.copytree(finished[0], folder)
    parts = sorted((folder / "parts").glob("*.parquet"))
    marked = pq.read_table(parts[0])
    column = marked.column_names.index("clip_loss")
    pq.write_table(marked.set_column(column, "clip_loss", pa.array(np.full(len(marked), 77.0))), parts[0])
    parts[1].unlink()
    parts[2].write_bytes(parts[2].read_bytes()[:-40])
    shutil.copy(parts[4], parts[3])  # other rows
    times = {part: part.stat().st_mtime_ns for part in parts if part not in parts[1:4]}
    lines: list[str] = []
    outcome = on_ray(cluster, source, clip, folder, lines)
    assert (outcome.scores.axes["clip_loss"][:PART] == 77.0).all()
    expected = finished[1].scores.axes
    for name in ("clip_loss", "early_ease"):
        np.testing.assert_allclose(outcome.scores.axes[name][PART:], expected[name][PART:], rtol=1e-5)
    assert {part: part.stat().st_mtime_ns for part in times} == times
    assert sum("computed again" in line for line in lines) == 2


@pytest.mark.parametrize("seen", [True, False])
def test_parts_come_from_workers_or_are_handed_back_where_these_do_not_see_the_folder(
    cluster: str,
    source: LabelledImages,
    clip: ZeroShotModel,
    finished: tuple[Path, ScanOutcome, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: bool,
) -> None:
    folder = tmp_path / "scan"
    shutil.copytree(finished[0], folder)
    parts = sorted((folder / "parts").glob("*.parquet"))
    before = {part: part.read_bytes() for part in parts}
    for part in parts[2:5]:
        part.unlink()
    written: list[str] = []

    def write(path: Path, data: bytes) -> None:
        written.append(path.name)
        path.write_bytes(data)

    monkeypatch.setattr(scan, "write_atomically", write)  # in this process alone
    if not seen:
        monkeypatch.setattr(scan, "_signed", lambda folder: nullcontext("another folder"))
    check_same(on_ray(cluster, source, clip, folder), finished[1])
    assert sorted(written) == ([] if seen else [part.name for part in parts[2:5]])
    assert {part: part.read_bytes() for part in parts} == before
    assert {path.suffix for path in (folder / "parts").iterdir()} == {".parquet"}


def test_a_part_that_is_gone_is_said(source: LabelledImages, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="is gone or damaged"):
        scan.rank_parts(source, tmp_path, [slice(0, PART)], "key", CONFIG, Run(accelerator=Accelerator(cpu=True)), ())


def test_too_many_bad_rows_stop_it(
    cluster: str,
    source: LabelledImages,
    clip: ZeroShotModel,
    finished: tuple[Path, ScanOutcome, list[int]],
    tmp_path: Path,
) -> None:
    shutil.copytree(finished[0], tmp_path / "scan")
    first, second = sorted((tmp_path / "scan" / "parts").glob("*.parquet"))[:2]
    for part in (first, second):
        table, header = read_table(part, "scan-part")
        columns = {name: table[name] for name in table.column_names}
        write_table(part, "scan-part", columns, header | {"skipped": [(row, "gone") for row in range(20)]})
    with pytest.raises(SourceFormatError, match="40 of 329 rows cannot be used"):
        on_ray(cluster, source, clip, tmp_path / "scan")


def test_the_command(
    cluster: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNPOISON_CACHE", str(tmp_path / "cache"))
    words = ["scan", "dataset", str(file), "--scorer-epochs", "1", "--json"]
    call = [sys.executable, "-m", "unpoison", *words, "--ray", cluster, "-o", "spread"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert main([*words, "--scorer-samples", str(SCORER_SAMPLES), "-o", "alone"]) == 0
    plain, spread = json.loads(capsys.readouterr().out), json.loads(done.stdout)
    assert spread | {"seconds": 0} == plain | {"seconds": 0}
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "spread").iterdir()} == names | {"parts"}
    assert main([*words, "--ray", cluster, "-o", "spread"]) == 0
    assert json.loads(capsys.readouterr().out) == spread
    assert main([*words, "--ray", cluster, "--dry-run", "-o", "none"]) == 0
    assert "parts/" in json.loads(capsys.readouterr().out)["files"]
    assert not (tmp_path / "none").exists()


def test_what_cannot_be(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["scan", "dataset", str(file), "-o", "none", "--ray"]
    assert main([*words, "local", "--method", "strip"]) == 2
    assert "--ray is for cgd, not for strip" in capsys.readouterr().err
    assert main([*words, "--method", "dao"]) == 2  # the address left out
    assert "--ray is for cgd, not for dao" in capsys.readouterr().err
    assert main([*words[:-1], "--method", "strip", "--ray"]) == 2
    assert "--ray is for cgd, not for strip" in capsys.readouterr().err
    assert main([*words, "local", "--pairs"]) == 2
    assert "--ray is for cgd, not for pairs" in capsys.readouterr().err
    assert main([*words[:3], "-o", "s3://bucket/scan", "--ray"]) == 2
    assert "-o s3://bucket/scan is an address" in capsys.readouterr().err
    assert not (tmp_path / "s3:").exists()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert main([*words, f"127.0.0.1:{taken.getsockname()[1]}"]) == 2
    said = capsys.readouterr().err
    assert "no Ray cluster answers at" in said
    assert "ray start --head" in said
    assert not (tmp_path / "none").exists()


def test_rows_travel_without_the_others(source: LabelledImages) -> None:
    import ray.cloudpickle

    pickle: Any = ray.cloudpickle
    memory = open_images("shapes:300:1")
    for whole in (source, memory, memory.select(range(0, 300, 3))):
        message = pickle.dumps(portable(whole, slice(10, 20)))
        assert len(message) < 60_000
        part = pickle.loads(message)
        assert part.ids == whole.ids[10:20]
        assert part.raw(range(10)) == whole.raw(range(10, 20))
        assert part.labels.tolist() == whole.labels[10:20].tolist()


def test_a_relative_folder_travels_as_the_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_shapes(6, seed=1)
    for row, pixels in enumerate(world.images):
        place = tmp_path / "here" / "set" / ("even" if row % 2 == 0 else "odd")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{row}.png")
    monkeypatch.chdir(tmp_path / "here")
    part = portable(open_images("set"), slice(1, 4))
    monkeypatch.chdir(tmp_path)
    assert all(isinstance(image, Image.Image) for image in part.decode(np.arange(3)))


def test_what_is_asked_for_without_a_cluster() -> None:
    assert on_a_sample(CGDConfig()).separation.scorer_samples == SCORER_SAMPLES
    assert on_a_sample(CONFIG) == CONFIG
    assert count_workers("local") >= 1
    with pytest.raises(UsageError, match="no Ray cluster answers at"):
        count_workers("127.0.0.1:1")
