"""``unpoison purify cgd``, ``pad-ft`` and the classics: repair a classifier with its own poisoned training set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from unpoison.cli.classifier_options import ClassifierRepairOptions
from unpoison.cli.classifier_repair import repair
from unpoison.cli.options import METHOD

Steps = Annotated[
    int | None, Parameter(group=METHOD, show_default=False, help="Optimizer steps. [default: the method's]")
]
SplitFrom = Annotated[
    Path | None,
    Parameter(
        metavar="RUN",
        group=METHOD,
        show_default=False,
        help="Folder of a `scan dataset` of this set, or its split.parquet. [default: separate as CGD does]",
    ),
]


def cgd(
    model: str,
    /,
    *,
    steps: Steps = None,
    asked: ClassifierRepairOptions,
) -> int:
    """Repair a backdoored classifier. The given model stays untouched; the repaired one has the same format.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        Folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
    """
    return repair("cgd", model, asked, {"steps": steps})


def pad_ft(
    model: str,
    /,
    *,
    scores: Annotated[
        Path | None,
        Parameter(
            metavar="RUN",
            group=METHOD,
            show_default=False,
            help="Folder of a `scan dataset` of this set, or its scores.parquet. [default: CGD's, made here]",
        ),
    ] = None,
    per_class: Annotated[
        int | None,
        Parameter(group=METHOD, show_default=False, help="Samples of each class to tune on. [default: 250]"),
    ] = None,
    rule: Annotated[
        Literal["suspects", "quantile", "learned", "margin", "none"] | None,
        Parameter(
            group=METHOD, show_default=False, help="How the bounds of activations are found. [default: suspects]"
        ),
    ] = None,
    paper: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            group=METHOD,
            help="As in the paper: samples chosen by the model's own losses alone, the head tuned from where it is.",
        ),
    ] = False,
    asked: ClassifierRepairOptions,
) -> int:
    """Repair a classifier in minutes: clip activations, tune the last layer. The given model stays untouched.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        Folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
    """
    own = {"per_class": per_class, "clip": {"rule": rule}}
    return repair("pad-ft", model, asked, own, paper=paper, given=scores)


def _classic(method: str, text: str) -> Any:
    """The verb of one of the defenses that were published for clean samples."""

    def verb(
        model: str,
        /,
        *,
        split_from: SplitFrom = None,
        steps: Steps = None,
        asked: ClassifierRepairOptions,
    ) -> int:
        return repair(method, model, asked, {"steps": steps}, given=split_from)

    verb.__name__ = method.replace("-", "_")
    verb.__doc__ = f"""{text} The given model stays untouched.

    Exit codes: 0 accepted, 2 error, 3 not accepted.

    Parameters
    ----------
    model
        Folder of unpoison or transformers, or a weights file (.safetensors, .pt, .pth) with --arch.
    """
    return verb


CLASSICS = {
    "ft": "Fine-tune a classifier on the clean part of its training set, the plainest baseline.",
    "ft-sam": "Fine-tune a classifier toward flat minima on the clean part of its training set.",
    "fine-pruning": "Prune the features that clean samples leave idle, then fine-tune.",
    "nad": "Distill attention from a fine-tuned copy of the classifier.",
    "anp": "Prune the neurons that small changes turn into a backdoor.",
    "i-bau": "Unlearn what one perturbation of all images can do.",
    "abl": "Train a new classifier that isolates poison and unlearns it.",
}
"""Verb to what it does, as its docstring says."""
ft, ft_sam, fine_pruning, nad, anp, i_bau, abl = (_classic(method, text) for method, text in CLASSICS.items())
