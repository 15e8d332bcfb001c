"""The folder of a benchmark's results: one JSON per cell, the plans of the grids that ran there, leases, shared steps.

bench.json        the schema
plans/GRID.json   which cells a grid has
cells/HASH.json   one result; written whole or not at all, and never again; HASH.damaged, what could not be read
leases/HASH.lock  locked by who works on a cell; the operating system frees it when that process ends
shared/           poisonings, victims, their rates and scores, by hash
work/HASH/        what a cell that was killed or failed had come to; cache/ decoded images; logs/ what workers said
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from unpoison.benchmark.cell import DAMAGED, Cell, CellResult, Names
from unpoison.benchmark.grid import Grid
from unpoison.benchmark.mirror import MARKER, Mirror
from unpoison.benchmark.settings import KNOWN_ADAPTIVE, Reported
from unpoison.errors import ResultError, SchemaVersionError, UsageError
from unpoison.storage import SCHEMA_VERSION, set_aside, write_atomically

SCHEMA = "unpoison/bench"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell of a plan; ``given``: the cell of its victim, "" where it is that one. ``adaptive``: whether its attack
    is made against a defense; None in plans that do not say."""

    key: str
    given: str
    names: Names
    kind: str
    adaptive: bool | None = None

    @property
    def is_adaptive(self) -> bool:
        return self.names.attack in KNOWN_ADAPTIVE if self.adaptive is None else self.adaptive


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a grid has: enough to say what is done and what is left, and to show it, without the grid's file."""

    grid: str
    path: str
    description: str
    not_run: str
    cells: tuple[Planned, ...]
    reported: tuple[Reported, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Running:
    """Who works on a cell, since when (seconds since 1970)."""

    key: str
    process: int
    since: float


@dataclass(frozen=True, kw_only=True)
class Store:
    """A results folder. ``mirror``: where its plans and cells are kept as well."""

    path: Path
    mirror: Mirror | None = None

    @classmethod
    def open(cls, path: Path, mirror: Mirror | None = None) -> Store:
        """Create the folder, or go on in it, after what is kept at ``mirror``.

        Raises UsageError for any other folder or address, SchemaVersionError, ResultError.
        """
        if mirror is not None and mirror.has(MARKER):
            _check_marker(mirror.read(MARKER), mirror.url)
        if (path / MARKER).exists():
            cls.read(path)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(
                f"{path} is not empty and holds no benchmark's results.", hint="Choose another folder with -o."
            )
        try:
            for name in ("cells", "leases", "plans", "logs"):
                (path / name).mkdir(parents=True, exist_ok=True)
            if not (path / MARKER).exists():
                body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION}
                write_atomically(path / MARKER, json.dumps(body, indent=2).encode())
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}.", hint="Choose another folder.") from error
        if mirror is not None:
            mirror.meet(path)
        return replace(cls.read(path), mirror=mirror)

    @classmethod
    def read(cls, path: Path) -> Store:
        """The folder as it is. Raises UsageError where there is none, SchemaVersionError, ResultError (damaged)."""
        marker = path / MARKER
        if not marker.is_file():
            raise UsageError(f"{path} holds no benchmark's results.", hint="Run a grid: unpoison bench run GRID.toml.")
        _check_marker(marker.read_bytes(), str(path))
        return cls(path=path)

    @property
    def place(self) -> str:
        """What -o has to say for the same results."""
        return str(self.path) if self.mirror is None else self.mirror.url

    def command(self, grid: str, key: str) -> str:
        """What makes a cell of the grid at this path again."""
        return shlex.join(("unpoison", "bench", "run", grid, "--cell", key, "-o", self.place))

    def file(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.json"

    def has(self, key: str) -> bool:
        return self.file(key).exists()

    def stamp(self, key: str) -> tuple[int, int] | None:
        """Another one for every result that is saved under the key; None without a result."""
        try:
            found = self.file(key).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def load(self, key: str) -> CellResult:
        """Raises ResultError, SchemaVersionError for a file that this version cannot read."""
        return CellResult.load(self.file(key))

    def found(self, key: str, names: Names) -> CellResult | None:
        """What is kept of a cell: None without a file, for one that cannot be read a result that says why."""
        if not self.has(key):
            return None
        try:
            return self.load(key)
        except ResultError as error:
            hint = "The next run sets it aside and makes the cell again."
            return CellResult(key=key, names=names, status=DAMAGED, reason=error.message, hint=hint)

    def set_aside(self, key: str) -> Path:
        """Give a cell's file a name that is no cell's; nothing is deleted."""
        return set_aside(self.file(key))

    def save(self, result: CellResult) -> None:
        """Keep a result. What the cell's run was going on from goes with a cell that needs it no more; one that took
        too long, or crashed, may go on from there under another limit."""
        result.save(self.file(result.key))
        self._send(f"cells/{result.key}.json")
        if result.status in ("done", "refused"):
            shutil.rmtree(self.path / "work" / result.key, ignore_errors=True)

    def keep_plan(self, grid: Grid) -> None:
        """Write which cells the grid has, unless that stands there already."""
        cells = tuple(
            Planned(key=cell.key, given="" if cell.is_given else cell.given().key, names=cell.names,
                    kind=cell.model.kind, adaptive=cell.attack is not None and cell.attack.adaptive)
            for cell in grid.cells
        )  # fmt: skip
        plan = Plan(grid=grid.name, path=grid.path, description=grid.description, not_run=grid.not_run, cells=cells,
                    reported=grid.reported)  # fmt: skip
        body = msgspec.json.format(msgspec.json.encode(plan), indent=1)
        file = self.path / "plans" / f"{grid.name}.json"
        if not file.exists() or file.read_bytes() != body:
            write_atomically(file, body)
            self._send(f"plans/{grid.name}.json")

    def refresh(self, key: str) -> None:
        """Fetch a result that another machine has sent since this folder was opened, if there is one."""
        if self.mirror is not None and not self.has(key):
            self.mirror.fetch_cell(self.path, key)

    def plans(self) -> list[Plan]:
        """Of every grid that ran here. Raises ResultError for a damaged one."""
        found = []
        for file in sorted((self.path / "plans").glob("*.json")):
            try:
                found.append(msgspec.json.decode(file.read_bytes(), type=Plan))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ResultError(
                    f"{file} is damaged ({error}).", hint="Run the grid again: it is rewritten."
                ) from error
        return found

    @contextmanager
    def lease(self, key: str) -> Iterator[bool]:
        """Whether the cell is ours to work on until the end of the block; nobody else gets it meanwhile."""
        lock = FileLock(self.path / "leases" / f"{key}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        note = self._note(key)
        try:
            note.write_text(json.dumps({"process": os.getpid(), "since": time.time()}))
            yield True
        finally:
            note.unlink(missing_ok=True)
            lock.release()

    def running(self) -> list[Running]:
        """Cells that somebody works on now; notes of processes that are gone do not count."""
        found = []
        for note in sorted((self.path / "leases").glob("*.json")):
            body = _read(note)
            lock = FileLock(self.path / "leases" / f"{note.stem}.lock", timeout=0)
            try:
                lock.acquire()
                lock.release()
            except Timeout:
                if body is not None:
                    found.append(Running(key=note.stem, process=body["process"], since=body["since"]))
        return found

    def _send(self, name: str) -> None:
        if self.mirror is not None:
            self.mirror.put(name, (self.path / name).read_bytes())

    def _note(self, key: str) -> Path:
        return self.path / "leases" / f"{key}.json"


def _check_marker(marker: bytes, place: str) -> None:
    """Raises ResultError, SchemaVersionError for results that this version cannot read."""
    try:
        body = json.loads(marker)
    except ValueError as error:
        hint = "Choose another folder with -o."
        raise ResultError(f"{place}: its {MARKER} is damaged ({error}).", hint=hint) from error
    found = body if isinstance(body, dict) else {}
    if found.get("schema") != SCHEMA:
        raise ResultError(f"{place}, {MARKER}: expected {SCHEMA}.", hint="Choose another folder with -o.")
    if found.get("schema_version") != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{place} was written with schema version {found.get('schema_version')}, this version reads "
            f"{SCHEMA_VERSION}.",
            hint="Choose another folder with -o; nothing there was touched.",
        )


def _read(note: Path) -> dict[str, Any] | None:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None  # it ended just now


def cell_message(cell: Cell, folder: Path) -> bytes:
    """A cell, the folder it works in and the one that its relative paths start from, as a line for another process."""
    return msgspec.json.encode({"cell": asdict(cell), "folder": str(folder), "start": str(Path.cwd())})


def read_message(line: bytes) -> tuple[Cell, Path, Path]:
    """What :func:`cell_message` wrote."""
    body = msgspec.json.decode(line)
    return msgspec.convert(body["cell"], Cell), Path(body["folder"]), Path(body["start"])
