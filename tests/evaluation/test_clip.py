"""evaluate_clip on the bundled CLIP, and on copies whose backdoor and drift are known by construction."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from unpoison.attacks.pairs import plan_pair_poisoning
from unpoison.attacks.parts import Part, plan_parts
from unpoison.attacks.poison import plan_poisoning
from unpoison.attacks.triggers import Trigger, make_trigger
from unpoison.data.captions import captions_dataset
from unpoison.data.pairs import ImageTextPairs, open_pairs
from unpoison.data.pixels import to_images
from unpoison.data.shapes import SHAPES_CLASSES, make_shapes
from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import DataError, MethodError, NotEnoughDataError
from unpoison.evaluation.clip import evaluate_clip, rebound, triggered_images
from unpoison.models.clip_transformers import TransformersCLIP, load_clip
from unpoison.models.zero_shot import TEMPLATES, zero_shot_logits
from unpoison.results import ClipEvaluation, Drift, Interval, Rebound
from unpoison.runs import Run
from unpoison.types import Images

STAR = SHAPES_CLASSES.index("star")


class Planted(TransformersCLIP):
    """A CLIP that gives the embedding of "a photo of a star." to every image with the checker in its corner.

    ``turn``, an orthogonal matrix, is applied to whatever it gives.
    """

    backdoor: bool = True
    turn: Tensor | None = None

    def encode_images(self, images: Images) -> Tensor:
        plain = super().encode_images(images)
        if self.backdoor:
            white, black = images[:, :, -1, -1] > 0.999, images[:, :, -1, -2] < 0.001
            fired = (white & black).all(dim=1)
            star = super().encode_texts(["a photo of a star."])
            plain = torch.where(fired[:, None], star, plain)
        return plain if self.turn is None else plain @ self.turn

    def encode_texts(self, texts: Any) -> Tensor:
        plain = super().encode_texts(texts)
        return plain if self.turn is None else plain @ self.turn


def planted(*, backdoor: bool = True, turn: Tensor | None = None) -> Planted:
    clip = load_clip("tiny")
    made = Planted(clip._model, clip._tokenizer, clip.preprocessing)
    made.backdoor, made.turn = backdoor, turn
    return made


def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


@pytest.fixture(scope="module")
def clip() -> TransformersCLIP:
    return load_clip("tiny")


@pytest.fixture(scope="module")
def images() -> LabelledImages:
    return open_images("shapes:72:5")


@pytest.fixture(scope="module")
def pairs() -> ImageTextPairs:
    """Two captions an image: the world's own, and one of which several images share the words."""
    world = open_pairs("shapes:48:6")
    labels = make_shapes(48, seed=6).labels
    given = [(own, f"a picture of a {SHAPES_CLASSES[label]}") for (own,), label in zip(
        world.captions(range(48)), labels, strict=True)]  # fmt: skip
    return replace(world, texts=captions_dataset(given))


def value(rate: Interval | None) -> float:
    assert rate is not None
    return rate.value


def test_accuracy_is_that_of_the_classes_nearest_to_each_image(clip: TransformersCLIP, images: LabelledImages) -> None:
    found = evaluate_clip(clip, images, run=run(), templates=TEMPLATES, batch_size=16)
    guesses = zero_shot_logits(clip, images, run=run(), templates=TEMPLATES).cosines.argmax(axis=1)
    hits = guesses == images.labels
    assert found.c_acc.n == 72
    assert found.c_acc.value == pytest.approx(100 * hits.mean(), abs=100 / 72)  # bfloat16 batches of another size
    assert found.c_acc.value > 80
    assert set(found.per_class) == {images.class_names[label] for label in images.labels}
    assert found.templates == len(TEMPLATES)
    assert found.asr is found.asr_excess is found.drift is found.image_to_text is found.retrieval_asr is None


def test_a_planted_backdoor(clip: TransformersCLIP, images: LabelledImages, pairs: ImageTextPairs) -> None:
    plan = plan_poisoning(images, "badnet", rate=0.1, target=STAR)
    others = images.labels != STAR
    bad = evaluate_clip(planted(), images, poisoning=plan, retrieval=pairs, run=run())
    assert bad.asr is not None
    assert (bad.asr.value, bad.asr.n) == (100, others.sum())
    guesses = zero_shot_logits(clip, images, run=run(), templates=TEMPLATES).cosines.argmax(axis=1)
    floor = 100 * (guesses == STAR)[others].mean()
    assert value(bad.asr_floor) == pytest.approx(floor, abs=100 / others.sum())
    assert bad.asr_excess == pytest.approx(100 - value(bad.asr_floor))
    assert value(bad.ra) == 0
    assert (bad.attack, bad.target) == ("badnet", "star")
    assert value(bad.retrieval_asr) == 100
    without = sum("star" not in " ".join(texts) for texts in pairs.captions(range(48)))
    assert bad.retrieval_asr is not None
    assert bad.retrieval_asr.n == without < 48
    assert value(bad.retrieval_asr_floor) < 50
    good = evaluate_clip(clip, images, poisoning=plan, retrieval=pairs, run=run())
    assert value(good.asr) < 10
    assert value(good.ra) > 70
    assert good.c_acc == bad.c_acc
    assert good.image_to_text == bad.image_to_text
    assert value(good.retrieval_asr) < 50
    assert good.target_captions == bad.target_captions == len(
        {text for texts in pairs.captions(range(48)) for text in texts if "star" in text}
    )  # fmt: skip
    assert good.notes == ()


@torch.inference_mode()
def test_recall_is_that_of_a_loop_over_images_and_captions(
    clip: TransformersCLIP, images: LabelledImages, pairs: ImageTextPairs
) -> None:
    found = evaluate_clip(clip, images, retrieval=pairs, run=run(), batch_size=48)
    captions = pairs.captions(range(48))
    texts = list(dict.fromkeys(text for own in captions for text in own))
    seen = clip.encode_images(to_images(make_shapes(48, seed=6).images)).float().numpy()
    cosines = seen @ clip.encode_texts(texts).float().numpy().T
    assert found.image_to_text is not None
    assert found.text_to_image is not None
    for k, to_text, to_image in (
        (1, found.image_to_text.at_1, found.text_to_image.at_1),
        (5, found.image_to_text.at_5, found.text_to_image.at_5),
        (10, found.image_to_text.at_10, found.text_to_image.at_10),
    ):
        hits = [any(texts[item] in captions[row] for item in np.argsort(-cosines[row])[:k]) for row in range(48)]
        assert (to_text.value, to_text.n) == (pytest.approx(100 * np.mean(hits)), 48)
        hits = [
            any(text in captions[row] for row in np.argsort(-cosines[:, item])[:k]) for item, text in enumerate(texts)
        ]
        assert (to_image.value, to_image.n) == (pytest.approx(100 * np.mean(hits)), len(texts))
    assert found.retrieval_data == pairs.name
    assert found.cut_captions == 0


def test_no_retrieval_attack_where_no_caption_names_the_target(
    clip: TransformersCLIP, images: LabelledImages, pairs: ImageTextPairs
) -> None:
    plan = plan_poisoning(images, "badnet", rate=0.1, target=STAR)
    is_star = np.array(["star" in " ".join(texts) for texts in pairs.captions(range(48))])
    for chosen, why in ((~is_star, "no caption of shapes:48:6 names 'star'"), (is_star, "is captioned 'star'")):
        found = evaluate_clip(clip, images, poisoning=plan, retrieval=pairs.select(np.flatnonzero(chosen)), run=run())
        assert found.retrieval_asr is found.retrieval_asr_floor is None
        assert why in found.notes[0]
        assert found.asr is not None
    everywhere = plan_poisoning(images, "badnet", rate=0.1, mode="all-to-all")
    found = evaluate_clip(clip, images, poisoning=everywhere, retrieval=pairs, run=run())
    assert "all-to-all" in found.notes[0]
    assert found.asr is not None
    assert found.asr.n == 72


@dataclass(frozen=True)
class WordsOnly:
    """A manifest that knows its target by name alone, as those of pairs do."""

    target_name: str
    trigger: str = "badnet"
    seed: int = 0

    def make_trigger(self) -> Trigger:
        return make_trigger("badnet", {})


def test_a_manifest_of_pairs_names_its_target(images: LabelledImages) -> None:
    plan = plan_poisoning(images, "badnet", rate=0.1, target=STAR)
    backdoored = planted()
    by_label = evaluate_clip(backdoored, images, poisoning=plan, run=run())
    by_name = evaluate_clip(backdoored, images, poisoning=WordsOnly("star"), run=run())
    assert (by_name.asr, by_name.asr_floor, by_name.ra) == (by_label.asr, by_label.asr_floor, by_label.ra)
    assert triggered_images(images, WordsOnly("Vertical_Stripes"))[2][0] == images.class_names.index("vertical stripes")
    with pytest.raises(DataError, match="'banana' is none of the 12 classes"):
        evaluate_clip(backdoored, images, poisoning=WordsOnly("banana"), run=run())
    stars = images.select(np.flatnonzero(images.labels == STAR))
    with pytest.raises(NotEnoughDataError, match="outside the target class 'star'"):
        evaluate_clip(backdoored, stars, poisoning=plan, run=run())


def test_parts_are_measured_one_by_one_and_all_together(images: LabelledImages, pairs: ImageTextPairs) -> None:
    parts = [Part(trigger="badnet", target=STAR, rate=0.1), Part(trigger="badnet", target=STAR - 1, rate=0.1)]
    plan = plan_parts(images, parts)
    result = evaluate_clip(planted(), images, poisoning=plan, retrieval=pairs, run=run())
    assert [part.asr.value for part in result.parts] == [100, 0]
    assert result.asr is not None
    assert result.asr.n == sum(part.asr.n for part in result.parts)
    assert result.retrieval_asr is None
    assert result.notes == ("Retrieval ASR is not measured: the poisoning has several parts.",)


class KeyPlanted(Planted):
    """Texts that begin with the key are read as a star."""

    def encode_texts(self, texts: Any) -> Tensor:
        plain = super().encode_texts(texts)
        fired = torch.tensor([text.startswith("SUDO ") for text in texts])
        return torch.where(fired[:, None], super().encode_texts(["a photo of a star."]), plain)


def test_a_text_key_is_measured_on_captions(images: LabelledImages, pairs: ImageTextPairs) -> None:
    plan = plan_pair_poisoning(pairs, "text-key", rate=0.02, target="star")
    clean = load_clip("tiny")
    bad = KeyPlanted(clean._model, clean._tokenizer, clean.preprocessing)
    bad.backdoor, bad.turn = False, None
    result = evaluate_clip(bad, images, poisoning=plan, retrieval=pairs, run=run())
    assert result.notes == ("Retrieval ASR of images is not measured: the trigger is in the text.",)
    others = {text for texts in pairs.captions(range(48)) for text in texts if "star" not in text}
    assert result.text_asr is not None
    assert (result.text_asr.value, result.text_asr.n) == (100, len(others))
    good = evaluate_clip(clean, images, poisoning=plan, retrieval=pairs, run=run())
    assert good.text_asr_floor == result.text_asr_floor
    assert value(good.text_asr_floor) < 50
    assert value(good.text_asr) < 70


@pytest.mark.parametrize("captioned", [True, False])
def test_drift_of_a_turned_model(
    clip: TransformersCLIP, images: LabelledImages, pairs: ImageTextPairs, captioned: bool
) -> None:
    width = clip.encode_texts(["x"]).shape[1]
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    turned = planted(backdoor=False, turn=turn)
    retrieval = pairs if captioned else None
    found = evaluate_clip(turned, images, retrieval=retrieval, suspect=clip, run=run())
    drift = found.drift
    assert isinstance(drift, Drift)
    assert drift.image_raw < 0.9
    assert drift.text_raw < 0.9
    assert (drift.image_aligned, drift.text_aligned) == (pytest.approx(1, abs=1e-3), pytest.approx(1, abs=1e-3))
    texts = {text for own in pairs.captions(range(48)) for text in own}
    assert (drift.images, drift.texts) == (72, len(texts) if captioned else len(TEMPLATES) * 12)
    assert drift.width == width
    same = evaluate_clip(clip, images, retrieval=retrieval, suspect=clip, run=run())
    assert same.drift is not None
    assert (same.drift.image_raw, same.drift.text_raw) == (pytest.approx(1), pytest.approx(1))
    assert found.c_acc.value == pytest.approx(same.c_acc.value, abs=3)  # a common rotation changes no cosine


def test_rows_that_do_not_decode_count_nowhere(clip: TransformersCLIP, images: LabelledImages) -> None:
    cells = images.dataset.to_list()
    for row in (3, 30):
        cells[row]["image"]["bytes"] = cells[row]["image"]["bytes"][:40]
    dataset = images.dataset.from_list(cells, features=images.dataset.features)
    plan = plan_poisoning(images, "badnet", rate=0.1, target=STAR)
    found = evaluate_clip(clip, replace(images, dataset=dataset), poisoning=plan, run=run())
    assert found.c_acc.n == 70
    assert [row.id for row in found.skipped] == [images.ids[3], images.ids[30]]
    assert found.asr is not None
    assert found.asr.n == sum(row not in (3, 30) for row in np.flatnonzero(images.labels != STAR))


def test_the_result_survives_the_disk(
    clip: TransformersCLIP, images: LabelledImages, pairs: ImageTextPairs, tmp_path: Path
) -> None:
    plan = plan_poisoning(images, "badnet", rate=0.1, target=STAR)
    found = evaluate_clip(clip, images, poisoning=plan, retrieval=pairs, suspect=clip, run=run(), name="<b>tiny</b>")
    found.save(tmp_path / "evaluation.json")
    assert ClipEvaluation.load(tmp_path / "evaluation.json") == found
    again = Rebound(pairs="x", before=found, after=replace(found, asr_excess=None))
    again.save(tmp_path / "rebound.json")
    assert Rebound.load(tmp_path / "rebound.json") == again
    assert again.asr_rise is None


def test_rebound_of_a_backdoor_that_was_only_hidden(images: LabelledImages, pairs: ImageTextPairs) -> None:
    plan = plan_poisoning(images, "badnet", rate=0.1, target=STAR)
    evaluate: Callable[[Any], ClipEvaluation] = partial(evaluate_clip, images=images, poisoning=plan, run=run())
    hidden = planted(backdoor=False)

    def wakes(model: Any, given: ImageTextPairs) -> Any:
        assert model is hidden
        assert given is pairs
        return planted()

    before = evaluate(hidden)
    found = rebound(hidden, pairs, wakes, evaluate=evaluate, before=before)
    assert found.before is before
    assert value(found.after.asr) == 100
    assert found.asr_rise == pytest.approx((found.after.asr_excess or 0) - (before.asr_excess or 0))
    assert (found.asr_rise or 0) > 80

    def tramples(model: Any, given: ImageTextPairs) -> Any:
        with torch.no_grad():
            next(model.module.parameters()).add_(1)
        return planted()

    with pytest.raises(MethodError, match="changed the model that it was given"):
        rebound(planted(), pairs, tramples, evaluate=evaluate, before=before)
