"""``unpoison purify ubt`` and ``abl-clip``: repair a CLIP with the poisoned pairs that it was trained on."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from unpoison.cli.clip_options import ClipRepairOptions, Sources, TrainedOn
from unpoison.cli.options import METHOD
from unpoison.cli.purify_clip import run_purification


def ubt(
    model: str,
    /,
    *,
    pairs: TrainedOn,
    reference: Annotated[
        str,
        Parameter(
            metavar="MODEL",
            group=METHOD,
            help='A CLIP that never saw the pairs, best the one that this was tuned from; "none" to do without.',
        ),
    ] = "tiny",
    paper: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="The plain reading of the paper: an overfitted copy ranks the pairs, words and patches are unlearnt.",
        ),
    ] = False,
    always: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="Unlearn where no group of pairs stands out as well, or none can be confirmed without a reference.",
        ),
    ] = False,
    asked: ClipRepairOptions = ClipRepairOptions(),
) -> int:
    """Repair a backdoored CLIP with its own poisoned training pairs: unlearn what the suspicious ones taught it.

    The suspicious pairs are listed and drawn under suspicious/ in the output folder, for `unpoison keep` as well. Where
    no group of pairs stands out the copy is the model as it came, and the result says so. Without a reference other
    than the model itself nothing can be decided: pairs are ranked only.

    Exit codes: 0 accepted, 2 error, 3 not accepted or undecided.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    own: dict[str, Any] = {"paper": paper, "always": always}
    known = None if reference == "none" else reference
    return run_purification("ubt", model, Sources(pairs=pairs), own, asked, {"reference": known})


def abl_clip(
    model: str,
    /,
    *,
    pairs: TrainedOn,
    asked: ClipRepairOptions = ClipRepairOptions(),
) -> int:
    """Repair a backdoored CLIP with its own poisoned training pairs: ABL, a baseline that always unlearns 2 percent.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        A CLIP: "tiny" (bundled), a folder, a weights file, an id, open_clip:NAME/TAG.
    """
    return run_purification("abl-clip", model, Sources(pairs=pairs), {}, asked)
