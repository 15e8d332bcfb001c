"""What the repairs of classifiers are told on the command line, whichever the method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unpoison.cli.options import METHOD, TEST, Opening, Planned, Reading


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ClassifierRepairOptions:
    """What every repair of a classifier can be told, beside the method's own options."""

    data: Annotated[str, Parameter(metavar="SOURCE", help="The training set of the model, as for `scan dataset`.")]
    clip: Annotated[
        str,
        Parameter(
            group=METHOD, help='A CLIP of transformers that judges the labels: "tiny" (bundled), a folder, an id.'
        ),
    ] = "tiny"
    bound: Annotated[
        float | None,
        Parameter(
            group=METHOD,
            show_default=False,
            help="Largest accepted fall of held-out accuracy, in points. [default: the method's]",
        ),
    ] = None
    config: Annotated[
        Path | None, Parameter(group=METHOD, show_default=False, help="TOML file with any keys of the method's config.")
    ] = None
    test: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE", group=TEST, show_default=False, help="Clean test images: measure before and after."
        ),
    ] = None
    manifest: Annotated[
        Path | None, Parameter(group=TEST, show_default=False, help="Poison manifest: measure attack success with it.")
    ] = None
    train_manifest: Annotated[
        Path | None,
        Parameter(
            group=TEST,
            show_default=False,
            help="Poison manifest of the training set: say how pure the trusted samples were. No method sees it.",
        ),
    ] = None
    opening: Opening = Opening()
    reading: Reading = Reading()
    running: Planned = Planned()
