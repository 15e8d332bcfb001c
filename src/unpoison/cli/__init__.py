"""The command line: ``main`` parses, runs one verb, and turns every outcome into an exit code.

Exit codes: 0 nothing found or done, 1 findings, 2 error, 3 inconclusive or not accepted, 130 interrupted.
Command modules are named by import path only: nothing heavy is imported before a verb is known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError

from unpoison import __version__
from unpoison.cli.help import AlignedHelp
from unpoison.errors import NoSeparationError, UnpoisonError

FINDINGS, ERROR, INCONCLUSIVE, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141


def build_app() -> App:
    """The tree of verbs. Help texts stand here so that ``--help`` need not import the verbs' modules."""
    plain: dict[str, Any] = {"help_format": "plaintext", "version_flags": []}
    app = App(
        name="unpoison",
        help="Finds and removes backdoors in labelled image sets, in classifiers and in CLIP models.",
        help_epilogue="Exit codes: 0 nothing found or done, 1 findings, 2 error, 3 inconclusive or not accepted.",
        version=__version__,
        help_format="plaintext",
        help_formatter=AlignedHelp(),
        suppress_keyboard_interrupt=False,  # ours to report
    )
    scan = App(name="scan", help="Find out whether something is poisoned.", sort_key=1, **plain)
    scan.command(
        "unpoison.cli.scan:dataset",
        name="dataset",
        help="Is this set of images, or of image-caption pairs, poisoned, and which samples?",
    )
    scan.command(
        "unpoison.cli.scan_model:model",
        name="model",
        help="Is this checkpoint backdoored? Its files, its training data, its weights, one verdict each.",
    )
    purify = App(name="purify", help="Remove a backdoor from a model.", sort_key=2, **plain)
    of_classifiers = {
        "cgd": "Repair a classifier with its own poisoned training set.",
        "pad-ft": "Repair a classifier in minutes: clip activations, tune the last layer.",
        "ft": "Baseline: fine-tune a classifier on the clean part of its training set.",
        "ft-sam": "Baseline: the same toward flat minima.",
        "fine-pruning": "Baseline: prune idle features, then fine-tune.",
        "nad": "Baseline: distill attention from a fine-tuned copy.",
        "anp": "Baseline: prune the neurons that small changes turn into a backdoor.",
        "i-bau": "Baseline: unlearn what one perturbation of all images can do.",
        "abl": "Baseline: train a new classifier that isolates poison and unlearns it.",
    }
    for name, text in of_classifiers.items():
        purify.command(f"unpoison.cli.purify_classifier:{name.replace('-', '_')}", name=name, help=text)
    of_clips = {
        "par": "Repair a CLIP with image-caption pairs: perturb and recover.",
        "clean-clip": "Repair a CLIP with image-caption pairs: CleanCLIP, a baseline.",
        "fine-tuning": "Fine-tune a CLIP on image-caption pairs, the plainest baseline.",
    }
    for name, text in of_clips.items():
        purify.command(f"unpoison.cli.purify_clip:{name.replace('-', '_')}", name=name, help=text)
    of_owned_pairs = {
        "ubt": "Repair a CLIP with its own poisoned pairs: expose and unlearn.",
        "abl-clip": "Repair a CLIP with its own poisoned pairs: ABL, a baseline.",
    }
    for name, text in of_owned_pairs.items():
        purify.command(f"unpoison.cli.purify_ubt:{name.replace('-', '_')}", name=name, help=text)
    of_zero_shot = {
        "cbpt": "Purify a CLIP's zero-shot classifier with a few labelled images; its weights stay.",
        "rvpt": "Baseline: learn repulsive visual prompts inside a frozen ViT.",
        "linear-probe": "Baseline: logistic regression on a few image embeddings.",
    }
    for name, text in of_zero_shot.items():
        purify.command(f"unpoison.cli.purify_cbpt:{name.replace('-', '_')}", name=name, help=text)
    app.command("unpoison.cli.demo:demo", name="demo", help="Poison, scan, purify, report: no data needed.", sort_key=0)
    app.command(scan)
    app.command(purify)
    bench = App(name="bench", help="Compare methods on attacks: run a grid, show its table.", sort_key=7.5, **plain)
    of_bench = {
        "run": "Run every cell of a grid that has no result yet.",
        "status": "How many cells are done, which run, which failed and why.",
        "table": "The table over all seeds, or the HTML leaderboard.",
    }
    for position, (name, text) in enumerate(of_bench.items()):
        bench.command(f"unpoison.cli.bench:{name}", name=name, help=text, sort_key=position)
    app.command(bench)
    verbs = {
        "keep": "Write a clean copy of a scanned set.",
        "attack": "Poison a copy of an image set, to test defenses with.",
        "evaluate": "Measure a classifier or a CLIP: accuracy, and attack success where a manifest is given.",
        "schema": "Print the JSON Schema of a result.",
        "report": "Write one offline HTML file about one or more runs.",
        "methods": "List the attacks, detectors and defenses.",
        "doctor": "Check this installation and this machine.",
    }
    for position, (name, text) in enumerate(verbs.items(), start=3):
        app.command(f"unpoison.cli.{name}:{name}", name=name, help=text, sort_key=position)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; never raises for an error of the user's or of ours."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    _quiet_libraries(verbose=_wants(tokens, "v", "--verbose"))
    try:
        code = _run(_with_addresses(tokens))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (``| head``): whatever is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _with_addresses(tokens: list[str]) -> list[str]:
    """``--ray`` alone as ``--ray local``: the parser has no options whose value may be left out."""
    filled = []
    for word, after in zip(tokens, [*tokens[1:], "-"], strict=True):
        filled += [word, "local"] if word == "--ray" and after.startswith("-") else [word]
    return filled


def _run(tokens: list[str]) -> int:
    try:
        code = build_app()(tokens, exit_on_error=False, print_error=False, result_action="return_value", verbose=False)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print("interrupted; the same command continues it", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    except NoSeparationError as error:
        _fail(tokens, error, type(error).__name__, error.message, error.hint)
        return INCONCLUSIVE
    except UnpoisonError as error:
        return _fail(tokens, error, type(error).__name__, error.message, error.hint)
    except CycloptsError as error:
        return _fail(tokens, error, "UsageError", str(error), f"See `{_verb(error)} --help`.")
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        hint = "This is a fault of unpoison: please report it with what the same command prints with -v."
        return _fail(tokens, error, type(error).__name__, message, hint)
    return code if isinstance(code, int) else 0


def _fail(tokens: list[str], error: BaseException, kind: str, message: str, hint: str) -> int:
    from unpoison.cli.console import printable

    if "--json" in tokens:
        import json

        body = {"error": {"type": kind, "message": message, "hint": hint}}
        print(json.dumps(body, ensure_ascii=False, indent=2))  # noqa: T201
    if _wants(tokens, "v", "--verbose"):
        import traceback

        traceback.print_exception(error)
    print(f"error: {printable(message)}\nhint: {printable(hint)}", file=sys.stderr)  # noqa: T201
    return ERROR


def _verb(error: CycloptsError) -> str:
    return " ".join(["unpoison", *(error.command_chain or ())])


def _wants(tokens: list[str], letter: str, name: str) -> bool:
    """Whether a flag is given. Errors of parsing itself must know it too, so the parser cannot be asked."""
    return any(token == name or (token[:1] == "-" and token[1:2] != "-" and letter in token[1:3]) for token in tokens)


def _quiet_libraries(*, verbose: bool) -> None:
    """Progress bars and advice of libraries are not ours to print; set before any of them is imported."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "error")
        import warnings

        warnings.simplefilter("ignore")
