"""The public verbs for zero-shot classifiers: a backdoored CLIP stays as it is, its classifier comes back purified.

from unpoison import load_any_clip, open_images, purify_with_cbpt
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unpoison.api_clip import describe_search, versions
from unpoison.data.sources import LabelledImages
from unpoison.defenses.baselines.linear_probe import LinearProbeConfig, fit_linear_probe
from unpoison.defenses.baselines.rvpt import RVPTConfig, learn_visual_prompts
from unpoison.defenses.cbpt import CBPTConfig, TunedClasses, tune_classes
from unpoison.defenses.dummies import answers_of
from unpoison.defenses.shots import (
    SEARCHED_AT_MOST,
    ChosenShots,
    Shots,
    accuracy,
    check_embeddings,
    choose_shots,
    embed,
    few_shots_warning,
)
from unpoison.detection.confirmed_search import kept_twice, search_twice
from unpoison.detection.inversion import InvertedTrigger, picture_of
from unpoison.detection.trigger_search import (
    TriggerSearch,
    load_search,
    search_triggers,
    store_search,
)
from unpoison.errors import DataError, NotEnoughDataError
from unpoison.evaluation.embeddings import ready
from unpoison.models.logit_scale import scale_warning
from unpoison.models.visual_prompts import with_visual_prompts
from unpoison.models.zero_shot import TEMPLATES, class_embeddings, cut_off
from unpoison.models.zero_shot_classifier import ZeroShotClassifier
from unpoison.runs import Run
from unpoison.types import ImageTextModel
from unpoison.zero_shot_results import DummyTrigger, ZeroShotPurification

FEWEST_CLASSES = 2
ONE_CLASSIFIER = "this zero-shot classifier alone: the CLIP with these class embeddings"
CBPT_LIMITS = (
    "Everything else that the CLIP is used for: retrieval, captioning, probes on its features and other class lists "
    "stay as attackable as before, because no weight was changed.",
    "Whether the true trigger is gone: the inverted ones are not it. The rates before and after are measured only "
    "where test images and a manifest are given.",
    "Targets that were not suspected, and targets that are none of the classes.",
)
NOT_FOUND = (
    "Whether the model is clean: a search among these classes found nothing out of line. Name a target to tune all the "
    "same where there is reason to doubt it.",
    "Targets that are none of the classes, triggers that depend on the image, models trained to hide from inversion.",
)
BASELINE_LIMITS = (
    "Everything else that the CLIP is used for: its weights are unchanged.",
    "Whether a backdoor was there, and whether it is gone: no trigger is looked for. The rates before and after are "
    "measured only where test images and a manifest are given.",
)


@dataclass(frozen=True, kw_only=True)
class ZeroShotOutcome:
    """The purified classifier, and what was done to it."""

    classifier: ZeroShotClassifier
    purification: ZeroShotPurification


def purify_with_cbpt(
    clip: ImageTextModel,
    images: LabelledImages,
    *,
    target: str | None = None,
    config: CBPTConfig | None = None,
    run: Run | None = None,
) -> ZeroShotOutcome:
    """Move the classes of a CLIP's zero-shot classifier away from a trigger that is looked for (arXiv 2502.19269).

    ``images``: a few clean labelled images of each class, whose names make the classifier; ``config.shots`` of each are
    learnt from, others judge, which nothing is fitted to. ``target``: the class that the backdoor leads to, where that
    is known; else it is looked for, and where none is suspected the class embeddings are the model's own, to the bit.
    The search looks at the images to learn from alone. It needs 30, and for each class 30 that the model does not take
    for it: where they are fewer than ``config.search_images``, images that are left over are added, without their
    labels, and a warning says how many. The CLIP's weights are never changed. Refused (``accepted`` is false) when
    held-out accuracy falls by more than ``config.bound`` points or a dummy keeps more than ``config.bound_asr``.
    Raises DataError (names that CLIP cannot tell apart; a target that is no class), NotEnoughDataError (one class, or
    two and no target; one image of a class; too few to look for a trigger with), NoSeparationError (embeddings that are
    all the same), SourceFormatError, ModelError.
    """
    config, run, begun = config or CBPTConfig(), run or Run(), time.monotonic()
    with _opened(clip, images, config.shots, run, searched=config.search_images if target is None else 0) as given:
        search = None
        if target is None:
            searched = _searched(given.chosen, config, run)
            given = replace(given, warnings=given.warnings + _beside(searched, given.learnt))
            search = _search(given, searched, config, run)
            targets, found = search.suspects, tuple(search.trigger_of(suspect) for suspect in search.suspects)
        else:
            targets, found = (_class_of(images.class_names, target),), ()
        named = tuple(images.class_names[suspect] for suspect in targets)
        finding = None if search is None else describe_search(search, images.class_names)
        if not targets:
            said = "The class embeddings are the model's own, to the bit."
            return given.outcome(
                "cbpt", config, given.classes, begun, run, accepted=True, left_alone=True, search=finding, steps=0,
                reason=f"{finding.reason if finding else ''} {said}".strip(), not_covered=NOT_FOUND,
            )  # fmt: skip
        tuned = tune_classes(
            given.clip, given.learnt, given.judging, given.classes, targets, config, found=found, judged=given.judged,
            run=run,
        )  # fmt: skip
        return given.outcome(
            "cbpt", config, tuned.classes, begun, run, accepted=tuned.accepted, prompts=tuned.prompts, targets=named,
            search=finding, dummies=_dummies(tuned, images.class_names), steps=config.steps, not_covered=CBPT_LIMITS,
            reason=f"Suspected: {', '.join(map(repr, named))}. {tuned.reason}",
        )  # fmt: skip


def purify_with_rvpt(
    clip: ImageTextModel, images: LabelledImages, *, config: RVPTConfig | None = None, run: Run | None = None
) -> ZeroShotOutcome:
    """Learn repulsive visual prompts in a frozen ViT (arXiv 2412.20392), the baseline of CBPT.

    As :func:`purify_with_cbpt`, without a search: the class embeddings stay, the classifier's CLIP is a copy with the
    prompts in its image tower. Raises UnsupportedModelError for an image tower that is no ViT, DivergedError.
    """
    config, run, begun = config or RVPTConfig(), run or Run(), time.monotonic()
    with _opened(clip, images, config.shots, run) as given:

        def learn() -> dict[str, Tensor]:
            return {"prompts": learn_visual_prompts(given.clip, given.learnt, given.classes, config, run=run)}

        prompts = run.step("rvpt", learn)["prompts"]
        return given.outcome(
            "rvpt", config, given.classes, begun, run, visual_prompts=prompts, not_covered=BASELINE_LIMITS,
            steps=config.epochs * -(-len(given.learnt) // config.batch_size),
        )  # fmt: skip


def purify_with_linear_probe(
    clip: ImageTextModel, images: LabelledImages, *, config: LinearProbeConfig | None = None, run: Run | None = None
) -> ZeroShotOutcome:
    """Logistic regression on a few image embeddings, the plainest baseline. As :func:`purify_with_cbpt`."""
    config, run, begun = config or LinearProbeConfig(), run or Run(), time.monotonic()
    with _opened(clip, images, config.shots, run) as given:
        rows = fit_linear_probe(given.clip, given.learnt, config)
        return given.outcome("linear-probe", config, rows, begun, run, steps=0, not_covered=BASELINE_LIMITS)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given:
    """A frozen copy of the CLIP, the shots, and the zero-shot classifier as it came; ``judged``: embeddings of the
    images that judge."""

    original: ImageTextModel
    clip: ImageTextModel
    images: LabelledImages
    chosen: ChosenShots
    classes: Float[Tensor, "k d"]
    judged: Float[Tensor, "j d"]
    warnings: tuple[str, ...]

    @property
    def learnt(self) -> Shots:
        return self.chosen.learnt

    @property
    def judging(self) -> Shots:
        return self.chosen.judging

    def outcome(
        self,
        method: str,
        config: Any,
        classes: Float[Tensor, "k d"],
        begun: float,
        run: Run,
        *,
        accepted: bool | None = None,
        reason: str = "",
        prompts: Tensor | None = None,
        visual_prompts: Tensor | None = None,
        **more: Any,
    ) -> ZeroShotOutcome:
        """``accepted`` None: by the fall of held-out accuracy alone."""
        made_for = self.original.fingerprint
        clip = self.original if visual_prompts is None else with_visual_prompts(self.original, visual_prompts)[0]
        before = accuracy(self.clip, self.judging, self.classes, seen=self.judged)
        if visual_prompts is None:
            after = accuracy(self.clip, self.judging, classes, seen=self.judged)
        else:
            after = accuracy(with_visual_prompts(self.clip, visual_prompts)[0], self.judging, classes)
        kept = before - after <= config.bound if accepted is None else accepted
        if accepted is None:
            reason = (
                f"Held-out accuracy is {after:.1f} percent, {before:.1f} before; a fall of at most {config.bound:.1f} "
                "points is accepted. No trigger was looked for."
            )
        classifier = ZeroShotClassifier(
            clip=clip, class_names=tuple(self.images.class_names), classes=classes.cpu(), made_for=made_for,
            prompts=None if prompts is None else prompts.cpu(),
            visual_prompts=None if visual_prompts is None else visual_prompts.cpu(),
        )  # fmt: skip
        source = {"images": self.images.name, "images_content": self.images.fingerprint()}
        cosine = torch.nn.functional.cosine_similarity(classes, self.classes, dim=1).mean()
        purification = ZeroShotPurification(
            method=method, config=asdict(config), accepted=kept, reason=reason, protects=ONE_CLASSIFIER,
            bound=config.bound, seconds=time.monotonic() - begun, seed=run.seed, held_out_before=before,
            held_out_after=after, class_names=classifier.class_names, learnt=len(self.learnt),
            judging=len(self.judging), class_cosine=float(cosine), warnings=self.warnings,
            skipped=(*self.images.skipped, *self.chosen.skipped),
            inputs={"model": made_for, **source} | versions(), **more,
        )  # fmt: skip
        return ZeroShotOutcome(classifier=classifier, purification=purification)


@contextmanager
def _opened(
    clip: ImageTextModel, images: LabelledImages, shots: int, run: Run, *, searched: int = 0
) -> Iterator[_Given]:
    """Everything checked and chosen before anything is learnt."""
    names = images.class_names
    if len(names) < FEWEST_CLASSES:
        raise NotEnoughDataError(
            "classes", have=len(names), need=FEWEST_CLASSES, hint="Give images of other classes too, with their names."
        )
    frozen = clip.copy()
    with ready(frozen, run):
        frozen.module.float().requires_grad_(False)
        classes = class_embeddings(frozen, names, TEMPLATES).float()
        check_embeddings(classes, what="class names")
        chosen = choose_shots(images, shots, frozen.image_size, searched=searched, run=run)
        judged = embed(frozen, chosen.judging)
        check_embeddings(judged)
        cut = cut_off(frozen, names, TEMPLATES)
        warnings = list(few_shots_warning(chosen, shots, names))
        if cut:
            warnings.append(f"The tokenizer cuts off {len(cut)} class names, {cut[0]!r} first.")
        warnings += scale_warning(frozen)
        yield _Given(
            original=clip,
            clip=frozen,
            images=images,
            chosen=chosen,
            classes=classes,
            judged=judged,
            warnings=tuple(warnings),
        )


def _searched(chosen: ChosenShots, config: CBPTConfig, run: Run) -> Shots:
    """What step 2 looks at, in random order: images to learn from, and where these are too few some that are to spare.
    Its triggers are dummies, and what judges may shape none."""
    generator, device = run.generator("search images"), chosen.learnt.labels.device
    lacking = max(0, config.search_images - len(chosen.learnt))
    others = torch.randperm(len(chosen.spare), generator=generator)[:lacking].to(device)
    shots = chosen.learnt.joined(chosen.spare.of(others))
    return shots.of(torch.randperm(len(shots), generator=generator)[:SEARCHED_AT_MOST].to(device))


def _beside(searched: Shots, learnt: Shots) -> tuple[str, ...]:
    """A sentence where the search looked at more than what is learnt from."""
    more = len(searched) - len(learnt)
    if more <= 0:
        return ()
    return (f"The search for a trigger looked at {more} images beside the {len(learnt)} that are learnt from, without "
            "their labels.",)  # fmt: skip


def _search(given: _Given, shots: Shots, config: CBPTConfig, run: Run) -> TriggerSearch:
    """Step 2. The second search has the same images the other way round, so that others of them judge."""

    def search() -> dict[str, Tensor]:
        images = shots.images()
        answers = answers_of(given.clip, given.classes)
        names = given.images.class_names
        if not config.confirm:
            return store_search(search_triggers(answers, images, names, config.search, run=run))
        return store_search(search_twice(answers, images, lambda: images.flip(0), names, config.search, run=run))

    stored = run.step("trigger-search", search)
    run.forget(kept_twice(len(given.images.class_names)))
    return load_search(stored, run.device)


def _class_of(names: Sequence[str], target: str) -> int:
    if target not in names:
        raise DataError(
            f"The target {target!r} is none of the {len(names)} classes.", hint=f"Known: {', '.join(names[:10])}."
        )
    return list(names).index(target)


def _dummies(tuned: TunedClasses, names: Sequence[str]) -> tuple[DummyTrigger, ...]:
    def entry(trigger: InvertedTrigger, left: float, aside: bool) -> DummyTrigger:
        return DummyTrigger(
            target=names[trigger.target], form=trigger.form, size=trigger.size, success=trigger.success, left=left,
            aside=aside, picture=picture_of(trigger),
        )  # fmt: skip

    each = [*((trigger, False) for trigger in tuned.dummies), *((trigger, True) for trigger in tuned.aside)]
    return tuple(entry(trigger, left, aside) for (trigger, aside), left in zip(each, tuned.left, strict=True))


__all__ = ["ZeroShotOutcome", "purify_with_cbpt", "purify_with_linear_probe", "purify_with_rvpt"]
