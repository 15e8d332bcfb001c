"""What this installation has and how it stands: the checks behind ``unpoison doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unpoison import __version__

Status = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: ``hint`` is empty when there is nothing to do."""

    what: str
    status: Status
    found: str
    hint: str = ""


def examine(cache: Path) -> list[Finding]:
    """Run every check; a check that breaks is itself a failed finding."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("dependencies", _dependencies),
        ("torchvision", _torchvision),
        ("torch", _torch),
        ("bfloat16", _bfloat16),
        ("accelerator", _accelerator),
        ("memory", _memory),
        ("disk", lambda: _disk(cache)),
        ("cache", lambda: _cache(cache)),
        ("bundled CLIP", _bundled_clip),
    ]
    findings = []
    for what, check in checks:
        try:
            findings.append(check())
        except Exception as error:
            findings.append(
                Finding(what=what, status="fail", found=f"{type(error).__name__}: {error}", hint="Reinstall unpoison.")
            )
    return findings


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, unpoison {__version__}"
    return Finding(what="python", status="ok", found=found)


def _dependencies() -> Finding:
    versions, missing = [], []
    for requirement in importlib.metadata.requires("unpoison") or []:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        hint = f"pip install {' '.join(missing)}"
        return Finding(what="dependencies", status="fail", found=f"missing: {', '.join(missing)}", hint=hint)
    return Finding(what="dependencies", status="ok", found=", ".join(versions))


def _torchvision() -> Finding:
    """A torchvision that does not fit torch keeps the CLIP of transformers from importing; an absent one does not."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding(what="torchvision", status="ok", found="not installed (not needed)")
    tried = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, timeout=120, check=False
    )
    if tried.returncode == 0:
        return Finding(what="torchvision", status="ok", found=importlib.metadata.version("torchvision"))
    last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding(
        what="torchvision",
        status="fail",
        found=f"installed, but does not import: {last}",
        hint="pip uninstall torchvision (unpoison does not need it), or install the build that fits torch.",
    )


def _torch() -> Finding:
    import torch

    found = f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"
    return Finding(what="torch", status="ok", found=found)


def _bfloat16() -> Finding:
    import torch

    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Finding(what="bfloat16", status="ok", found="no fast bfloat16 on this processor: float32 is used")
    return Finding(what="bfloat16", status="ok", found="fast on this processor")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding(what="accelerator", status="ok", found=", ".join(names))
    if torch.backends.mps.is_available():
        return Finding(what="accelerator", status="ok", found="Apple GPU")
    return Finding(
        what="accelerator",
        status="ok",
        found="none: runs use the processor",
    )


def _memory() -> Finding:
    total, free = memory()
    if total is None or free is None:
        return Finding(what="memory", status="warn", found="unknown on this system")
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 2 * GIB:
        return Finding(what="memory", status="warn", found=found, hint="A scan takes up to 2 GiB; close something.")
    return Finding(what="memory", status="ok", found=found)


def memory() -> tuple[int | None, int | None]:
    """Total and available bytes of main memory, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    sizes = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
    return sizes.get("MemTotal"), sizes.get("MemAvailable")


def _disk(cache: Path) -> Finding:
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free at {place}"
    if free < 2 * GIB:
        hint = "Decoded images need about 3 KiB each at 32 px; choose another --cache."
        return Finding(what="disk", status="warn", found=found, hint=hint)
    return Finding(what="disk", status="ok", found=found)


def _cache(cache: Path) -> Finding:
    if not cache.exists():
        return Finding(what="cache", status="ok", found=f"{cache} (not there yet)")
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and not path.is_symlink())
    found = f"{cache}: {size / 2**20:,.0f} MiB (safe to delete)"
    if not os.access(cache, os.W_OK):
        return Finding(what="cache", status="warn", found=found, hint="It cannot be written; choose another --cache.")
    return Finding(what="cache", status="ok", found=found)


def _bundled_clip() -> Finding:
    from unpoison.models.clip_transformers import load_clip

    model = load_clip("tiny")
    count = sum(parameter.numel() for parameter in model.module.parameters())
    found = f"loads, {count / 1e6:.1f} M parameters, {model.image_size} px, {model.fingerprint[:12]}"
    return Finding(what="bundled CLIP", status="ok", found=found)
