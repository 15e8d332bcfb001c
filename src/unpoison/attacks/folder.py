"""A poisoned copy in a folder that may already hold it: whole, or cut short by a kill."""

from __future__ import annotations

from pathlib import Path

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.parts import PoisoningParts, apply_parts, load_labelled, write_poisoned_parts
from unpoison.attacks.poison import apply_poisoning, write_poisoned
from unpoison.attacks.write import DATA, MANIFEST, write_copy
from unpoison.data.sources import LabelledImages
from unpoison.errors import RunFolderMismatchError

_DECIDES = ("trigger", "config", "seed", "mode", "target", "rate", "source", "source_fingerprint",
            "selection", "selected_by")  # fmt: skip
Plan = Poisoning | PoisoningParts


def write_or_continue(source: LabelledImages, poisoning: Plan, folder: Path, *, manifest_only: bool = False) -> Plan:
    """The poisoned copy in ``folder``, or what is missing of this very poisoning there; returns its manifest.

    Raises RunFolderMismatchError when the folder holds another poisoning, UsageError when it holds anything else.
    """
    if not (folder / MANIFEST).is_file():
        if isinstance(poisoning, PoisoningParts):
            write_poisoned_parts(source, poisoning, folder, manifest_only=manifest_only)
        else:
            write_poisoned(source, poisoning, folder, manifest_only=manifest_only)
        return load_labelled(folder / MANIFEST)
    difference = _difference(load_labelled(folder / MANIFEST), poisoning)
    if difference:
        raise RunFolderMismatchError(str(folder), difference)
    if not manifest_only and not (folder / DATA).exists():
        whole = isinstance(poisoning, PoisoningParts)
        poisoned = apply_parts(source, poisoning) if whole else apply_poisoning(source, poisoning)
        write_copy(poisoned, poisoning, folder, overlaid=source.overlay is not None)
    return load_labelled(folder / MANIFEST)


def parts_of(poisoning: Plan) -> list[Poisoning]:
    """The single poisonings of labelled images that a manifest holds."""
    parts = poisoning.parts if isinstance(poisoning, PoisoningParts) else (poisoning,)
    return [part for part in parts if isinstance(part, Poisoning)]


def _difference(there: Plan, now: Plan) -> list[str]:
    old, new = parts_of(there), parts_of(now)
    if len(old) != len(new):
        return [f"parts: {len(old)} there, {len(new)} now"]
    return [
        f"{name}: {getattr(before, name)!r} there, {getattr(after, name)!r} now"
        for before, after in zip(old, new, strict=True)
        for name in _DECIDES
        if getattr(before, name) != getattr(after, name)
    ]
