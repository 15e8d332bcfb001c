"""CBPT: its loss term by term, its dummies and shots, what it leaves alone, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from unpoison.api_zero_shot import purify_with_cbpt, purify_with_linear_probe, purify_with_rvpt
from unpoison.data.sources import LabelledImages, open_images
from unpoison.defenses import cbpt
from unpoison.defenses.cbpt import CBPTConfig, cbpt_loss, tune_classes
from unpoison.defenses.class_prompts import ClassPrompts, FreeClasses, all_classes, choose_classes
from unpoison.defenses.dummies import answers_of, contrast, excess, moved, noise
from unpoison.defenses.shots import choose_shots
from unpoison.detection.inversion import InversionConfig, InvertedTrigger
from unpoison.detection.trigger_search import TriggerSearchConfig
from unpoison.errors import ConfigError, DataError, NoSeparationError, NotEnoughDataError
from unpoison.models.checkpoints import hash_weights
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.models.logit_scale import usable_scale
from unpoison.models.zero_shot import TEMPLATES, class_embeddings
from unpoison.runs import Run

QUICK = CBPTConfig(
    shots=4,
    views=2,
    steps=5,
    loud_steps=2,
    inversion=InversionConfig(steps=2, batch_size=8),
    search=TriggerSearchConfig(inversion=InversionConfig(steps=1, batch_size=8)),
)


@pytest.fixture
def clip(small_folder: Path) -> TransformersCLIP:
    return load_clip(small_folder)


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    found = open_images("shapes:400:3")
    kept = np.flatnonzero(found.labels < 4)
    return replace(found.select(kept), class_names=found.class_names[:4])


@pytest.fixture
def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    plain, worn, given, tuned = unit(5, 7), unit(5, 7, seed=1), unit(3, 7, seed=2), unit(3, 7, seed=3)
    labels, target, scale = torch.tensor([0, 1, 2, 1, 0]), 1, 9.0
    classes = torch.arange(3)
    z, za, h, g = (part.numpy() for part in (plain, worn, given, tuned))
    opinion, clean = softmax(scale * z @ h.T), np.log(softmax(scale * z @ g.T))
    others = labels.numpy() != target
    answers = np.log(softmax(scale * za[others] @ g.T))
    own = np.eye(3)[labels.numpy()]
    terms = {
        "clean_weight": -(opinion * clean).sum(axis=1).mean(),
        "trigger_weight": -((0.25 * own + 0.75 * opinion)[others] * answers).sum(axis=1).mean(),
        "suppress_weight": -np.log(1 - softmax(scale * (za[others] @ g.T + 0.2 * np.eye(3)[target]))[:, target]).mean(),
        "align_weight": (1 - (g * h).sum(axis=1)).mean(),
    }
    nothing: dict[str, Any] = dict.fromkeys(terms, 0.0)
    for name, value in terms.items():
        settings: dict[str, Any] = nothing | {name: 2.0, "label_share": 0.25, "margin": 0.2}
        config = CBPTConfig(**settings)
        found = cbpt_loss(plain, (target, worn), labels, classes, tuned, given, scale, config)
        assert float(found) == pytest.approx(2 * value, rel=1e-4), name
    labelled = CBPTConfig(**(nothing | {"clean_weight": 1.0, "clean": "labels"}))
    found = cbpt_loss(plain, (target, worn), labels, classes, tuned, given, scale, labelled)
    assert float(found) == pytest.approx(-(own * clean).sum(axis=1).mean(), rel=1e-4)


def test_dummies_are_computed_in_half_precision_where_that_is_fast(
    clip: TransformersCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip.module.requires_grad_(False)
    answers = answers_of(clip, unit(3, 8))

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr("unpoison.models.clip_transformers.inference_dtype", lambda _: dtype)
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        given = answers(images)
        assert given.dtype == torch.float32
        torch.nn.functional.cross_entropy(given, torch.tensor([0, 1, 2, 0])).backward()
        assert images.grad is not None
        return images.grad.flatten()

    exact, fast = gradient(torch.float32), gradient(torch.bfloat16)
    assert not torch.equal(fast, exact)
    assert float(torch.nn.functional.cosine_similarity(fast, exact, dim=0)) > 0.98


def test_a_subset_of_classes_keeps_labels_and_target() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = choose_classes(torch.tensor([7, 3]), 50, 5, generator)
    assert {3, 7} <= set(chosen.tolist())
    assert chosen.tolist() == sorted(chosen.tolist())
    assert choose_classes(torch.tensor([1]), 6, 5, generator).tolist() == [0, 1, 2, 3, 4, 5]


def test_free_classes_begin_where_they_were_given() -> None:
    given = unit(4, 6)
    carrier = FreeClasses(given)
    assert torch.allclose(all_classes(carrier), given, atol=1e-6)
    carrier.of(torch.tensor([1])).sum().backward()
    assert carrier.free.grad is not None
    assert float(carrier.free.grad[[0, 2, 3]].abs().max()) == 0


def test_prompts_begin_as_the_text_that_they_stand_for(clip: TransformersCLIP) -> None:
    prompts = ClassPrompts(clip, ("cat", "dog"), "a photo of a")
    assert prompts.free.shape[0] == 2
    with torch.no_grad():
        wanted = clip.encode_texts(["a photo of a cat.", "a photo of a dog."])
    assert torch.allclose(all_classes(prompts), wanted, atol=1e-5)
    prompts.of(torch.tensor([0])).sum().backward()
    assert prompts.free.grad is not None
    assert float(prompts.free.grad[0].abs().max()) > 0
    assert float(prompts.free.grad[1].abs().max()) == 0


def test_a_dummy_moves_around_the_edges() -> None:
    mask, pattern = torch.zeros(1, 4, 4), torch.zeros(3, 4, 4)
    pattern[:, 3, 3] = 1
    dummy = InvertedTrigger(form="additive", target=0, mask=mask, pattern=pattern, size=0.1, success=90.0)
    assert moved(dummy, (1, 2)).pattern[:, 0, 1].tolist() == [1, 1, 1]
    assert moved(dummy, (1, 2)).pattern.sum() == 3


def test_with_a_target_the_classes_move_and_the_model_does_not(
    clip: TransformersCLIP, images: LabelledImages, run: Run
) -> None:
    before = hash_weights(dict(clip.module.state_dict()))
    outcome = purify_with_cbpt(clip, images, target=images.class_names[1], config=QUICK, run=run)
    assert hash_weights(dict(clip.module.state_dict())) == before
    result, classifier = outcome.purification, outcome.classifier
    assert result.targets == (images.class_names[1],)
    assert result.search is None
    assert len(result.dummies) == 5
    assert [entry.aside for entry in result.dummies] == [False] * 4 + [True]
    assert all(entry.picture for entry in result.dummies)
    given = class_embeddings(clip, images.class_names, TEMPLATES)
    assert classifier.classes.shape == given.shape
    assert torch.allclose(classifier.classes.norm(dim=1), torch.ones(4), atol=1e-5)
    assert not torch.allclose(classifier.classes, given, atol=1e-4)
    assert "no weight was changed" in result.not_covered[0]
    again = purify_with_cbpt(clip, images, target=images.class_names[1], config=QUICK, run=run)
    assert torch.equal(again.classifier.classes, classifier.classes)


def test_the_plain_reading_gives_prompts(clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    config = CBPTConfig.as_published(
        shots=4, steps=3, loud_steps=2, rounds=1, least_asr=0.0, inversion=QUICK.inversion, learning_rate=0.1
    )
    outcome = purify_with_cbpt(clip, images, target=images.class_names[0], config=config, run=run)
    prompts = outcome.classifier.prompts
    assert prompts is not None
    assert prompts.ndim == 3
    assert len(outcome.purification.dummies) == 3  # one, another of the round, and the one aside


def test_rounds_of_the_plain_reading_are_like_its_first_dummy(
    clip: TransformersCLIP, images: LabelledImages, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    against: list[torch.Tensor] = []

    def watched(*given: Any, **more: Any) -> Any:
        against.append(given[3])
        return contrast(*given, **more)

    monkeypatch.setattr(cbpt, "contrast", watched)
    config = CBPTConfig.as_published(
        steps=3, loud_steps=2, rounds=1, least_asr=0.0, inversion=QUICK.inversion, learning_rate=0.1, epsilon=2 / 255
    )
    shots, classes = choose_shots(images, 4, 16, run=run), class_embeddings(clip, images.class_names, TEMPLATES)
    clip.module.requires_grad_(False)
    tuned = tune_classes(clip, shots.learnt, shots.judging, classes, [0], config, run=run)
    assert len(tuned.dummies) == len(against) == 2
    assert torch.equal(against[0], classes)
    assert not torch.allclose(against[1], classes, atol=1e-4)
    for dummy in tuned.dummies:
        assert dummy.form == "patch" or float(dummy.pattern.abs().max()) <= 2 / 255 + 1e-6


@pytest.mark.parametrize("negatives", [True, False])
@pytest.mark.parametrize("positives", [0, 2])
def test_the_contrast_is_info_nce(
    positives: int, negatives: bool, clip: TransformersCLIP, images: LabelledImages, run: Run
) -> None:
    shots = choose_shots(images, 4, 16, run=run).learnt
    plain, given = unit(len(shots), 8), unit(4, 8, seed=1)
    objective = contrast(shots, plain, clip, given, 1, positives=positives, negatives=negatives, temperature=0.5)
    others = torch.nonzero(shots.labels != 1)[:, 0]
    rows = torch.tensor([2, 0, 7])
    with torch.no_grad():
        loss, share = objective(shots.images(others[rows]), rows)
        z = clip.encode_images(shots.images(others[rows])).numpy()
    terms = []
    for place, row in enumerate(rows.tolist()):
        near = [given[1].numpy(), *plain[shots.labels == 1][:positives].numpy()]
        far = [*plain[others[rows]].numpy(), given[int(shots.labels[others[row]])].numpy()]
        pull, push = (np.exp(np.array(part) @ z[place] / 0.5).sum() for part in (near, far))
        terms.append(-np.log(pull / (pull + push) if negatives else pull))
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-4)
    assert share == pytest.approx(np.mean((z @ given.numpy().T).argmax(axis=1) == 1))


@pytest.mark.parametrize("form", ["additive", "patch"])
def test_a_contrastive_dummy_has_the_form_that_was_asked_for(
    form: Literal["additive", "patch"], clip: TransformersCLIP, images: LabelledImages, run: Run
) -> None:
    config = replace(QUICK, dummies="contrast", forms=(form,), epsilon=8 / 255)
    found = purify_with_cbpt(clip, images, target=images.class_names[0], config=config, run=run).purification
    assert [entry.form for entry in found.dummies if not entry.aside] == [form]
    if form == "additive":
        assert all(entry.size <= 8 / 255 + 1e-6 for entry in found.dummies if not entry.aside)


def test_shared_prompts_are_one_set(clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    prompts = ClassPrompts(clip, ("cat", "dog"), "a photo of a", shared=True)
    assert prompts.free.shape[0] == 1
    with torch.no_grad():
        wanted = clip.encode_texts(["a photo of a cat.", "a photo of a dog."])
    assert torch.allclose(all_classes(prompts), wanted, atol=1e-5)
    config = CBPTConfig.as_published(
        shots=4, steps=2, loud_steps=2, rounds=0, inversion=QUICK.inversion, learning_rate=0.1, shared=True
    )
    found = purify_with_cbpt(clip, images, target=images.class_names[0], config=config, run=run).classifier.prompts
    assert found is not None
    assert len(found) == 4
    assert torch.equal(found, found[:1].expand_as(found))


@pytest.mark.parametrize(("delta", "count"), [("none", 0), ("random", 2)])
def test_without_inversion(
    delta: Literal["none", "random"], count: int, clip: TransformersCLIP, images: LabelledImages, run: Run
) -> None:
    config = replace(QUICK, delta=delta, clean="labels")
    outcome = purify_with_cbpt(clip, images, target=images.class_names[1], config=config, run=run)
    dummies = outcome.purification.dummies
    assert [entry.aside for entry in dummies] == [False] * count + [True]
    assert [entry.size for entry in dummies[:count]] == list(config.loud[:count])
    given = class_embeddings(clip, images.class_names, TEMPLATES)
    assert not torch.allclose(outcome.classifier.classes, given, atol=1e-4)


def test_noise_is_as_large_everywhere(clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    shots, given = choose_shots(images, 4, 16, run=run).learnt, unit(4, 8)
    dummy = noise(clip, shots, given, 2, 0.1, run=run)
    assert torch.allclose(dummy.pattern.abs(), torch.tensor(0.1))
    assert 0.3 < float((dummy.pattern > 0).float().mean()) < 0.7
    assert (dummy.target, dummy.size) == (2, 0.1)
    assert dummy.success == excess(clip, shots, dummy, given)[0]


def test_nothing_found_gives_the_classifier_back_to_the_bit(
    clip: TransformersCLIP, images: LabelledImages, run: Run
) -> None:
    never = replace(QUICK, search=replace(QUICK.search, success=100.0, index=99.0, index_apart=99.0))
    outcome = purify_with_cbpt(clip, images, config=never, run=run)
    assert outcome.purification.left_alone
    assert outcome.purification.accepted
    assert torch.equal(outcome.classifier.classes, class_embeddings(clip, images.class_names, TEMPLATES))
    assert outcome.purification.search is not None
    assert outcome.purification.dummies == ()


def test_what_costs_too_much_or_leaves_the_trigger_is_not_accepted(
    clip: TransformersCLIP, images: LabelledImages, run: Run
) -> None:
    wild = replace(QUICK, learning_rate=50.0, clean_weight=0.0, suppress_weight=0.0, bound_asr=0.0, bound=0.0)
    result = purify_with_cbpt(clip, images, target=images.class_names[0], config=wild, run=run).purification
    worst = max(entry.left for entry in result.dummies)
    fall = result.held_out_before - result.held_out_after
    assert result.accepted == (worst <= 0 and fall <= 0)
    assert f"{worst:.1f} percent" in result.reason


@pytest.mark.parametrize("scale", [0.0, float("inf")])
def test_any_logit_scale_is_worked_with(scale: float, clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    clip.module.get_parameter("logit_scale").data.fill_(float(np.log(scale)) if scale else -80.0)
    assert 1 <= usable_scale(clip) <= 100
    result = purify_with_cbpt(clip, images, target=images.class_names[0], config=QUICK, run=run).purification
    assert np.isfinite(result.held_out_after)
    assert any("logit scale" in warning for warning in result.warnings)


def test_bad_inputs_are_refused(clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    first = images.labels == 0
    lonely = images.select(np.concatenate([np.flatnonzero(~first), np.flatnonzero(first)[:1]]))
    with pytest.raises(NotEnoughDataError, match="have 1, need at least 2"):
        purify_with_cbpt(clip, lonely, config=QUICK, run=run)
    two = replace(images.select(np.flatnonzero(images.labels < 2)), class_names=images.class_names[:2])
    with pytest.raises(NotEnoughDataError, match="classes to compare: have 2"):
        purify_with_cbpt(clip, two, config=QUICK, run=run)
    pairs = images.select(np.concatenate([np.flatnonzero(images.labels == label)[:2] for label in range(4)]))
    with pytest.raises(NotEnoughDataError, match="images for inversion: have 4, need at least 30"):
        purify_with_cbpt(clip, pairs, config=QUICK, run=run)
    twins = replace(images, class_names=("cat", "CAT", "dog", "cow"))
    with pytest.raises(DataError, match="cannot tell these class names apart"):
        purify_with_cbpt(clip, twins, config=QUICK, run=run)
    with pytest.raises(DataError, match="'banana' is none of the 4 classes"):
        purify_with_cbpt(clip, images, target="banana", config=QUICK, run=run)
    with pytest.raises(ConfigError, match="views must be positive"):
        CBPTConfig(views=0)
    with pytest.raises(ConfigError, match="shared is about prompts"):
        CBPTConfig(shared=True)
    with pytest.raises(ConfigError, match="only InfoNCE has negatives"):
        CBPTConfig(negatives=False)
    with pytest.raises(ConfigError, match="a choice of forms"):
        CBPTConfig(forms=("additive",))
    with pytest.raises(ConfigError, match="expected forms among"):
        CBPTConfig(dummies="contrast", forms=())
    with pytest.raises(ConfigError, match="random signs have no size"):
        CBPTConfig(delta="random", loud=())
    with pytest.raises(ConfigError, match="rounds invert again, delta is none"):
        CBPTConfig.as_published(delta="none")


@pytest.mark.parametrize(
    "purify",
    [
        purify_with_cbpt,
        lambda clip, images, **more: purify_with_cbpt(clip, images, target=images.class_names[0], **more),
        purify_with_rvpt,
        purify_with_linear_probe,
    ],
)
def test_one_class_is_no_classifier(purify: Any, clip: TransformersCLIP, images: LabelledImages, run: Run) -> None:
    one = replace(images.select(np.flatnonzero(images.labels == 0)), class_names=images.class_names[:1])
    with pytest.raises(NotEnoughDataError, match="classes: have 1, need at least 2"):
        purify(clip, one, run=run)


def test_embeddings_that_are_all_equal_are_no_ground_to_judge_on(
    clip: TransformersCLIP, images: LabelledImages, run: Run
) -> None:
    for name, weight in clip.module.named_parameters():
        if name.startswith("vision_model.embeddings."):
            weight.data.zero_()
    with pytest.raises(NoSeparationError, match="the same embedding"):
        purify_with_cbpt(clip, images, config=QUICK, run=run)
