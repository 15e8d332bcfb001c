"""The file verdict: what a model's files are, and whether loading them would run code. Nothing is loaded for it.

Steps
    1. Every entry of the folder: no link may lead out of it. Size and SHA-256 of each file.
    2. What each file is, by its first bytes: a name can lie.
    3. safetensors: the header by itself (:mod:`unpoison.detection.safetensors_files`). Pickles: their opcodes, by
       fickling (:mod:`unpoison.detection.pickle_files`), and so any other file, entry of a zip archive or array of
       objects that can be read as one. JSON: nothing that asks for code from elsewhere.
    4. Refused for any finding. A model of no format that we know is not recognized, and the list of those that are
       comes with the verdict.
What it cannot see
    Faults in the libraries that read these formats, code that a user runs beside the weights (a training script), and
    what is in archives other than zip, or in archives within archives.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from unpoison.detection.pickle_files import (
    ARCHIVE,
    LEGACY,
    PICKLE,
    ZIP,
    check_archived,
    check_loose,
    check_pickled,
    looks_like_safetensors,
    named_pickle,
)
from unpoison.detection.safetensors_files import check_tensors
from unpoison.errors import ModelError, UnsafeCheckpointError
from unpoison.model_results import FileFinding, FileVerdict, ScannedFile
from unpoison.models.checkpoints import LFS_POINTER, PICKLED_SUFFIXES
from unpoison.models.folders import check_config, leads_out

SAFETENSORS, JSON, TEXT, SOURCE = "safetensors", "JSON", "text", "Python source"
POINTER, TORCHSCRIPT = "Git LFS pointer", "TorchScript archive"
RECOGNIZED = (
    "a .safetensors file",
    f"a torch weights file ({', '.join(PICKLED_SUFFIXES)}) that holds tensors only",
    "a folder of transformers: config.json with safetensors or pytorch_model.bin",
    "a folder of open_clip: open_clip_config.json with one weights file",
    "a folder that unpoison wrote: unpoison.json with its weights",
)
MAX_FILES = 2_000
_DESCRIPTIONS = {
    "unpoison.json": "unpoison folder",
    "open_clip_config.json": "open_clip folder",
    "config.json": "transformers folder",
}
_WEIGHTS = (SAFETENSORS, ARCHIVE, LEGACY)
_NOT_FETCHED = "a Git LFS pointer, not the weights: run `git lfs pull` where it was cloned, and scan again"
_PROTOCOLS = (b"\2", b"\3", b"\4", b"\5")
_MAGIC = (
    (b"GGUF", "GGUF"),
    (b"\x89HDF\r\n", "HDF5 (Keras)"),
    (b"\x93NUMPY", "NumPy array"),
    (b"\x1f\x8b", "gzip archive"),
    (b"7z\xbc\xaf", "7z archive"),
    (b"\x08", "ONNX or another protocol buffer"),
)
_TEXTS = (".md", ".txt", ".gitattributes", ".html", ".yaml", ".yml", ".toml", ".csv", ".license", "")


def judge_files(path: Path) -> FileVerdict:
    """The verdict on one weights file or one model folder. Raises ModelError where there is neither."""
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder.", hint="Check the path of the model.")
    if path.is_file():
        found, findings = _look_at(path, _name_of(path, path.parent))
        files = [found]
        format = found.format
        known = found.format in _WEIGHTS
    else:
        entries, links = _entries(path)
        looked = [_look_at(entry, _name_of(entry, path)) for entry in entries]
        files = [found for found, _ in looked]
        findings = [*links, *(finding for _, own in looked for finding in own)]
        description = next((name for name in _DESCRIPTIONS if any(found.name == name for found in files)), None)
        weights = sorted({found.format for found in files if found.format in _WEIGHTS})
        known = description is not None and bool(weights)
        format = f"{_DESCRIPTIONS[description]}: {', '.join(weights)}" if known and description else "folder"
    notes = _notes(files)
    digest = files[0].sha256 if path.is_file() else _digest_of([(found.name, found.sha256) for found in files])
    common = {"format": format, "sha256": digest, "files": tuple(files), "notes": notes}
    if findings:
        first = findings[0]
        more = f" ({len(findings) - 1} more findings)" if len(findings) > 1 else ""
        reason = f"{first.file}: {first.reason}{more}. Nothing was loaded or executed."
        return FileVerdict(word="refused", reason=reason, findings=tuple(findings), **common)
    if not known:
        reason = f"{path.name}: {format} is no format of a model that is recognized. Nothing was loaded."
        return FileVerdict(word="not recognized", reason=reason, recognized=RECOGNIZED, **common)
    reason = f"{format} with {_code_in(files)}; {len(files)} {'file' if len(files) == 1 else 'files'} looked at."
    return FileVerdict(word="accepted", reason=reason, **common)


def hash_files(path: Path) -> str:
    """The hash that :func:`judge_files` gives, without a look at what the files are. Raises ModelError."""
    if path.is_file():
        return _sha256(path)
    entries = _entries(path)[0]
    return _digest_of([(_name_of(entry, path), _sha256(entry)) for entry in entries])


def _entries(folder: Path) -> tuple[list[Path], list[FileFinding]]:
    """All files inside, in order, and a finding for each link that leads out and for far too many files."""
    found, links = [], []
    for entry in _walk(folder):
        name = _name_of(entry, folder)
        if leads_out(folder, entry):
            reason = f"a link that leads out of the folder, to {os.path.realpath(entry)}"
            links.append(FileFinding(file=name, kind="link", reason=reason))
        elif entry.is_file():
            found.append(entry)
        elif not entry.is_dir():
            links.append(FileFinding(file=name, kind="malformed", reason="neither a file nor a folder"))
        if len(found) > MAX_FILES:
            reason = f"more than {MAX_FILES:,} files; give the model's own folder"
            return found[:MAX_FILES], [*links, FileFinding(file=".", kind="malformed", reason=reason)]
    return sorted(found), links


def _walk(folder: Path) -> Iterator[Path]:
    """Files and links of a folder and its folders; links to folders are named, not followed."""
    for home, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        links = [name for name in folders if (Path(home) / name).is_symlink()]
        for name in sorted((*files, *links)):
            yield Path(home) / name


def _look_at(path: Path, name: str) -> tuple[ScannedFile, list[FileFinding]]:
    format = format_of(path)
    findings: list[FileFinding] = []
    if format == POINTER:
        if path.suffix.lower() in (".safetensors", *PICKLED_SUFFIXES):
            findings = [FileFinding(file=name, kind="unusable", reason=_NOT_FETCHED)]
    elif format in (ARCHIVE, LEGACY, TORCHSCRIPT):
        findings = check_pickled(path, name)
    elif format == SAFETENSORS and path.suffix.lower() == ".safetensors":
        with path.open("rb") as file:
            start = file.read(2)
        # The name is a promise that some loaders do not keep to: what begins like a pickle is read as one, too.
        findings = check_loose(lambda: path.open("rb"), name) if start[:1] == b"\x80" or start == b"PK" else []
        findings += check_tensors(path, name)
    else:
        findings = check_loose(lambda: path.open("rb"), name)
        if zipfile.is_zipfile(path):
            findings += check_archived(path, name)
        if format == SAFETENSORS:
            findings += check_tensors(path, name)
        elif format == JSON:
            findings += _check_json(path, name)
    runs = format == SOURCE or any(finding.kind in ("code", "remote code") for finding in findings)
    size, digest = path.stat().st_size, _sha256(path)
    return ScannedFile(name=name, format=format, bytes=size, sha256=digest, can_run_code=runs), findings


def format_of(path: Path) -> str:
    """By the first bytes; the name decides only where they do not."""
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(LFS_POINTER):
        return POINTER
    if start.startswith(ZIP) or (suffix in PICKLED_SUFFIXES and zipfile.is_zipfile(path)):
        return _format_of_archive(path)
    if suffix == ".safetensors":
        return SAFETENSORS
    if suffix in PICKLED_SUFFIXES:
        return LEGACY
    if named_pickle(path.name) or (start[:1] == b"\x80" and start[1:2] in _PROTOCOLS):
        return PICKLE
    if suffix == ".json":
        return JSON
    if suffix in (".py", ".pyc", ".so", ".dll"):
        return SOURCE
    if looks_like_safetensors(start, path.stat().st_size):
        return SAFETENSORS
    known = next((name for magic, name in _MAGIC if start.startswith(magic)), None)
    return known or (TEXT if suffix in _TEXTS and b"\0" not in start else f"{suffix or 'a file'} of an unknown kind")


def _format_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError):
        names = []  # what is weights by its name is then found to be damaged
    if any("code" in name.split("/")[1:-1] or name.endswith("constants.pkl") for name in names):
        return TORCHSCRIPT
    torch_like = any(name.endswith("data.pkl") for name in names) or path.suffix.lower() in PICKLED_SUFFIXES
    return ARCHIVE if torch_like or path.suffix == ".safetensors" else "zip archive"


def _check_json(path: Path, name: str) -> list[FileFinding]:
    try:
        check_config(path)
    except UnsafeCheckpointError as error:
        reason = error.message.removeprefix(f"{path}: ")
        return [FileFinding(file=name, kind="remote code", reason=reason, hint=error.hint)]
    except ModelError as error:
        # Not every .json of a folder is read by a loader, and a list is one too: only configs have to be objects.
        if Path(name).name.endswith(("config.json", "unpoison.json", ".index.json")):
            reason = error.message.removeprefix(f"{path}: ")
            return [FileFinding(file=name, kind="unusable", reason=reason, hint=error.hint)]
    return []


def _code_in(files: list[ScannedFile]) -> str:
    """What of accepted files is code, from the rows that say so."""
    pickles = any(found.format in (ARCHIVE, LEGACY) for found in files)
    said = "a pickle of tensors and nothing else" if pickles else "weights that hold no code"
    sources = [found.name for found in files if found.can_run_code]
    if not sources:
        return said
    more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    return f"{said}, beside code that no loader of ours runs ({sources[0]}{more})"


def _notes(files: list[ScannedFile]) -> tuple[str, ...]:
    notes = [
        f"{found.name}: {found.format}; no loader of ours runs or reads it."
        for found in files
        if found.format not in (*_WEIGHTS, JSON, TEXT, TORCHSCRIPT)
    ]
    if any(found.format in (ARCHIVE, LEGACY) and not found.can_run_code for found in files):
        notes.append("A pickle is a program: load it elsewhere with weights_only=True, or convert it to safetensors.")
    return tuple(notes)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(files: list[tuple[str, str]]) -> str:
    """Of all files' names and hashes, in order."""
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in files).encode()).hexdigest()


def _name_of(path: Path, folder: Path) -> str:
    """The path inside the folder; bytes that are no text become escapes."""
    return str(path.relative_to(folder)).encode(errors="backslashreplace").decode()
