"""The report on a zero-shot classifier: its verdicts in words, and nothing of the data as markup."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unpoison.clip_results import FoundTrigger, TriggerFinding
from unpoison.report.html import render_report
from unpoison.report.runs import ReportRun
from unpoison.report.zero_shot_view import zero_shot_verdict
from unpoison.results import ClipEvaluation, Interval
from unpoison.storage import from_json, to_json
from unpoison.zero_shot_results import DummyTrigger, ZeroShotPurification

EVIL = "<script>alert(1)</script>"


def rate(value: float) -> Interval:
    return Interval(value=value, low=value - 1, high=value + 1, n=900)


def evaluation(asr: float) -> ClipEvaluation:
    return ClipEvaluation(
        model="m", data="d", templates=1, c_acc=rate(68.0), asr=rate(asr), asr_floor=rate(2.0), asr_excess=asr - 2.0,
        ra=rate(50.0), attack="badnet-stripes", target=EVIL, per_class={}, truncated_classes=(), retrieval_data=None,
        drift=None, skipped=(), notes=(), seconds=1.0,
    )  # fmt: skip


RESULT = ZeroShotPurification(
    method="cbpt", config={"shots": 16}, accepted=True, reason=f"Suspected: {EVIL}.", protects="this classifier",
    bound=1.5, steps=300, seconds=60.0, seed=0, class_names=(EVIL, "cat", "dog"), held_out_before=68.0,
    held_out_after=67.5, learnt=48, judging=30, class_cosine=0.9, targets=(EVIL,),
    search=TriggerFinding(reason="out of line", found=(
        FoundTrigger(caption=EVIL, size=0.01, success=95.0, index=4.0, suspected=True, picture="not a picture"),
    )),
    dummies=(DummyTrigger(target=EVIL, form="additive", size=0.01, success=95.0, left=0.0, aside=True),),
    not_covered=("everything else",),
)  # fmt: skip


def test_a_page_of_hostile_names_holds_no_markup_of_theirs() -> None:
    page = render_report([ReportRun(name=EVIL, path="out", zero_shot=RESULT)])
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "The inverted triggers" in page
    assert "everything else" in page
    assert "(kept aside)" in page


@pytest.mark.parametrize(
    ("changes", "tone", "words"),
    [
        ({}, "ok", "no attack was tested"),
        ({"accepted": False}, "alert", "do not rely on this zero-shot classifier"),
        ({"left_alone": True}, "ok", "nothing was done"),
        ({"before": evaluation(92.0), "after": evaluation(2.0)}, "ok", "the CLIP itself is as it was"),
        ({"before": evaluation(92.0), "after": evaluation(60.0)}, "alert", "still works"),
    ],
)
def test_verdicts(changes: dict, tone: str, words: str) -> None:
    result = replace(RESULT, **changes)
    verdict = zero_shot_verdict(result)
    assert verdict.tone == tone
    assert words in verdict.sentence
    assert result.attack_left == (words == "still works")


def test_the_result_comes_back_from_disk() -> None:
    again = from_json(to_json(RESULT), ZeroShotPurification)
    assert again == RESULT
