"""What a cell's result is made of: figures, cost, versions, machine, pictures; with or without figures."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import inspect
import io
import platform
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import unpoison
from unpoison import __version__
from unpoison.attacks.triggers import PAIR_TRIGGERS
from unpoison.benchmark.cell import Cell, CellResult, Cost, Figures
from unpoison.benchmark.shared import Step
from unpoison.results import ClipEvaluation, Evaluation

LIBRARIES = ("torch", "transformers", "accelerate", "numpy")
_PICTURE = 96  # pixels of each half of a trigger's picture


def failed(cell: Cell, status: Any, reason: str, hint: str = "") -> CellResult:
    """The result of a cell that has no figures."""
    cost = Cost(threads=cell.limits.threads)
    return CellResult(
        key=cell.key, names=cell.names, status=status, reason=reason, hint=hint, inputs=cell.inputs, cost=cost,
        versions=versions(), machine=machine(cell),
    )  # fmt: skip


def done(cell: Cell, **more: Any) -> CellResult:
    return CellResult(
        key=cell.key,
        names=cell.names,
        status="done",
        inputs=cell.inputs,
        versions=versions(),
        machine=machine(cell),
        **more,
    )


def versions() -> dict[str, str]:
    """What figures may depend on beside the inputs."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"unpoison": __version__, "code": code(), "python": platform.python_version()} | found


@cache
def code() -> str:
    """16 hexadecimal digits of the package's source files, as they were when this process first asked: between two
    releases the version does not tell which code made a cell."""
    return source_hash(Path(unpoison.__file__).parent)


def source_hash(folder: Path) -> str:
    """The hash of the names and contents of all Python files in ``folder`` and below."""
    total = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.rglob("*.py")):
        body = file.read_bytes()
        total.update(f"{file.relative_to(folder).as_posix()}\0{len(body)}\0".encode() + body)
    return total.hexdigest()


def machine(cell: Cell) -> str:
    """The processor's architecture, the accelerator, and the precision that training was asked for; no host's name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    asked = "" if cell.precision == "no" else f", {cell.precision}"
    return f"{platform.system()} {platform.machine()}, {device}{asked}"


def cost_of(step: Step) -> Cost:
    """What the victim's cell shows: what training it took."""
    return Cost(seconds=step.seconds, processor=step.processor, resumed=step.resumed)


def figures(found: Evaluation | ClipEvaluation) -> Figures:
    """What tables show of an evaluation. An attack that changes no pixel has no ASR of images; where its trigger is in
    the text, the retrieval ASR is that of texts."""
    more: dict[str, Any] = {}
    if isinstance(found, ClipEvaluation):
        more |= {"retrieval_asr": found.retrieval_asr, "drift": found.drift}
        more |= {
            key: recall.at_1
            for key in ("image_to_text", "text_to_image")
            if (recall := getattr(found, key)) is not None
        }
        if found.attack in PAIR_TRIGGERS:
            of_texts = found.retrieval_asr if found.text_asr is None else found.text_asr
            more["retrieval_asr"] = of_texts
            return Figures(c_acc=found.c_acc, **more)
    return Figures(
        c_acc=found.c_acc, asr=found.asr, asr_floor=found.asr_floor, asr_excess=found.asr_excess, ra=found.ra, **more
    )


def call_with(function: Callable[..., Any], *positional: Any, offered: Mapping[str, Any]) -> Any:
    """``function`` with those of the ``offered`` values that it has parameters for."""
    known = inspect.signature(function).parameters
    return function(*positional, **{name: value for name, value in offered.items() if name in known})


def changed_share(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Percent of the numbers in ``before`` that are others in ``after``, or are not there."""
    total = changed = 0
    for name, value in before.items():
        total += value.numel()
        other = after.get(name)
        same = other is not None and other.shape == value.shape
        changed += int((value.cpu() != other.cpu()).sum()) if same and other is not None else value.numel()
    return 100 * changed / max(total, 1)


def side_by_side(clean: Image.Image, triggered: Image.Image) -> str:
    """Both pictures, without and with the trigger, as one PNG in base64."""
    canvas = Image.new("RGB", (2 * _PICTURE + 8, _PICTURE), "white")
    for at, image in enumerate((clean, triggered)):
        shown = image.convert("RGB").resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST)
        canvas.paste(shown, (at * (_PICTURE + 8), 0))
    sink = io.BytesIO()
    canvas.save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()
