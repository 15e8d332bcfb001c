"""What a report says about the scan of a model: three verdicts apart, in words, and what was not covered."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from unpoison.detection.canaries import summary
from unpoison.model_results import ModelScan
from unpoison.report.page import RunView, Step, Tile, provenance
from unpoison.report.runs import DATA, ReportRun, redraw_picture
from unpoison.report.text import counted, percent
from unpoison.report.views import Verdict, command

_TONES = {"backdoored": "alert", "suspicious": "alert", "no evidence": "ok", "inconclusive": "caution"}
_SENTENCES = {
    "backdoored": "These weights behave as if backdoored",
    "suspicious": "These weights are suspicious",
    "no evidence": "No evidence of a backdoor was found in the weights. This does not prove the model clean.",
    "inconclusive": "Whether these weights are backdoored could not be decided.",
}


_POISONED = "The data that the model was trained on are poisoned."


def model_view(run: ReportRun, scan: ModelScan, anchor: str) -> RunView:
    weights = scan.weights
    return RunView(
        anchor=anchor,
        kind="Model scan",
        run=run,
        verdict=model_verdict(scan),
        tiles=[
            Tile(value=scan.file.word, name="file verdict", note=scan.file.format),
            Tile(value=scan.data.word, name="data verdict", note=scan.data.scan.source if scan.data.scan else ""),
            Tile(value=weights.word, name="weights verdict", note=weights.method),
        ],
        steps=next_steps(scan, run.path, run.inputs),
        scan=None,
        tested=_tested(scan),
        not_covered=list(scan.not_covered),
        warnings=[*scan.warnings, *run.notes],
        provenance=provenance(run, scan, source=scan.model),
        summary={"found": scan.data.reason if scan.data.word == "poisoned" else weights.reason},
    )


def model_verdict(scan: ModelScan) -> Verdict:
    """The gravest of the three verdicts. Files that are refused come first: the weights were not looked at then."""
    poisoned = scan.data.word == "poisoned"
    if scan.file.word != "accepted":
        sentence = (
            "The model's format is not recognized, so nothing of it was loaded."
            if scan.file.word == "not recognized"
            else "The model's files are refused: do not load them."
            if scan.file.dangerous
            else "The model's files are damaged or incomplete, so nothing of them was loaded."
        )
        return Verdict(
            tone="alert" if scan.file.dangerous or poisoned else "caution",
            word=scan.file.word.capitalize(),
            sentence=f"{sentence} {_POISONED}" if poisoned else sentence,
            detail=scan.file.reason,
        )
    weights = scan.weights
    sentence, detail = _SENTENCES[weights.word], weights.reason
    if weights.word in ("backdoored", "suspicious"):
        sentence += f", toward '{weights.target_name}'." if weights.target_name is not None else "."
        if poisoned:
            sentence, detail = f"{sentence} {_POISONED}", f"{detail} {scan.data.reason}"
    elif poisoned:
        return Verdict(tone="alert", word="Poisoned data", sentence=f"{_POISONED} {sentence}", detail=scan.data.reason)
    elif scan.data.open and weights.word == "no evidence":
        sentence = f"{sentence} Whether its training data are poisoned could not be decided."
        return Verdict(tone="caution", word="Inconclusive", sentence=sentence, detail=scan.data.reason)
    return Verdict(tone=_TONES[weights.word], word=weights.word.capitalize(), sentence=sentence, detail=detail)


def trigger_picture(scan: ModelScan) -> str:
    """The inverted trigger, drawn anew, as a data address; "" where there is none."""
    drawn = redraw_picture(scan.weights.picture) if scan.weights.picture else ""
    return f"data:image/png;base64,{base64.b64encode(drawn).decode()}" if isinstance(drawn, bytes) else ""


def next_steps(scan: ModelScan, path: str, inputs: Mapping[str, Any]) -> list[Step]:
    """What to do next; ``inputs`` are those of run.json in the folder ``path``, from which the command is made
    again."""
    again = command_of(scan, inputs)
    if scan.file.dangerous:
        return [Step(text="Do not load these files with any tool. Ask the publisher for safetensors.")]
    if scan.file.word == "refused":
        return [
            Step(text="See below what is wrong with each file. Fetch those anew, and compare checksums."),
            Step(text="Then scan again:", line=command(*again)),
        ]
    if scan.file.word == "not recognized":
        return [Step(text="Convert the model to one of the recognized formats where you trust its author, and scan.")]
    steps = []
    if scan.data.word == "poisoned":
        keep = command("unpoison", "keep", f"{path}/{DATA}", "-o", "clean.parquet")
        steps.append(Step(text="Look at the suspects of the training data, and write a copy without them:", line=keep))
    if scan.weights.word in ("backdoored", "suspicious"):
        repair = "par MODEL --pairs CLEAN_PAIRS" if scan.kind == "CLIP" else "pad-ft MODEL --data TRAINING_DATA"
        steps += [
            Step(text="Keep the model out of use. Look at the trigger below: does it show a thing of that class?"),
            Step(text="Repair it, and scan the repaired model:", line=f"unpoison purify {repair} -o purified"),
        ]
    if scan.weights.made_up:
        steps.append(Step(text="Scan with images like those that it is for:", line=command(*again, "--data", "SOURCE")))
    if not scan.kind:
        text = "Mend what the weights verdict names, or give --arch, and scan again:"
        return [*steps, Step(text=text, line=command(*again))]
    if not scan.weights.references:
        line = command(*again, "--clean-reference", "MODEL")
        steps.append(Step(text="Compare it with models of the same kind that are known to be clean:", line=line))
    if scan.power is None:
        steps.append(Step(text="Find out what this scan would have missed:", line=command(*again, "--power")))
    return steps


def command_of(scan: ModelScan, inputs: Mapping[str, Any]) -> list[str]:
    """The words of the command that made this scan, as run.json has its inputs; without them those with the model."""
    given = inputs.get("command")
    return [str(word) for word in given] if isinstance(given, list) else ["unpoison", "scan", "model", scan.model]


def _tested(scan: ModelScan) -> list[str]:
    lines = [f"{counted(len(scan.file.files), 'file')}, looked at before anything was loaded. {scan.file.reason}"]
    if scan.data.scan is not None:
        samples = counted(scan.data.scan.samples, "sample")
        lines.append(f"The training data, {samples} of {scan.data.scan.source}, by {scan.data.scan.method}.")
    weights = scan.weights
    if weights.images:
        lines.append(
            f"The weights by {weights.method} on {weights.image_source}: {percent(weights.covered, 0)} of the search."
        )
    if weights.references:
        lines.append(f"Beside {counted(len(weights.references), 'clean reference')}: {', '.join(weights.references)}.")
    if scan.power is not None:
        lines.append(f"Power: {summary(scan.power.canaries)}. {scan.power.reason}")
    return lines
