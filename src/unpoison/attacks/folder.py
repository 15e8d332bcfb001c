"""A poisoned copy in a folder that may already hold it: whole, or cut short by a kill."""

from __future__ import annotations

from pathlib import Path

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.poison import apply_poisoning, write_poisoned
from unpoison.attacks.write import DATA, MANIFEST, write_copy
from unpoison.data.sources import LabelledImages
from unpoison.errors import RunFolderMismatchError

_DECIDES = ("trigger", "config", "seed", "mode", "target", "rate", "source", "source_fingerprint")


def write_or_continue(
    source: LabelledImages, poisoning: Poisoning, folder: Path, *, manifest_only: bool = False
) -> Poisoning:
    """:func:`write_poisoned` into ``folder``, or what is missing of this very poisoning there; returns its manifest.

    Raises RunFolderMismatchError when the folder holds another poisoning, UsageError when it holds anything else.
    """
    if not (folder / MANIFEST).is_file():
        write_poisoned(source, poisoning, folder, manifest_only=manifest_only)
        return Poisoning.load(folder / MANIFEST)
    there = Poisoning.load(folder / MANIFEST)
    difference = [
        f"{name}: {getattr(there, name)!r} there, {getattr(poisoning, name)!r} now"
        for name in _DECIDES
        if getattr(there, name) != getattr(poisoning, name)
    ]
    if difference:
        raise RunFolderMismatchError(str(folder), difference)
    if not manifest_only and not (folder / DATA).exists():
        write_copy(apply_poisoning(source, poisoning), poisoning, folder, overlaid=source.overlay is not None)
    return Poisoning.load(folder / MANIFEST)
