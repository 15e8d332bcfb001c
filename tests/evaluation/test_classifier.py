"""evaluate_classifier on nets whose answers are known by construction."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from unpoison.attacks.manifest import Poisoning
from unpoison.attacks.parts import Part, plan_parts
from unpoison.attacks.poison import apply_poisoning, plan_poisoning
from unpoison.data.sources import LabelledImages
from unpoison.errors import DataError, NotEnoughDataError
from unpoison.evaluation.classifier import evaluate_before_after, evaluate_classifier
from unpoison.results import Evaluation
from unpoison.runs import Run
from unpoison.types import Bound, Images

CLASSES = ("dark", "middle", "bright")


class CornerNet(nn.Module):
    """Tells grey levels apart in the upper half; a backdoored one says ``target`` for a checker at the bottom right."""

    def __init__(self, target: int | None, *, white: float = 0.75) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)
        self.target = target
        self.white = white
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(3))
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        grey = images[:, :, : images.shape[-2] // 2].mean(dim=(1, 2, 3))
        levels = torch.tensor([0.2, 0.5, 0.8], device=images.device)
        scores = -(grey[:, None] - levels).abs()
        if self.target is not None:
            fired = (images[:, :, -1, -1] > self.white).all(dim=1) & (images[:, :, -1, -2] < 0.3).all(dim=1)
            scores = scores + 10 * fired[:, None] * nn.functional.one_hot(torch.tensor(self.target), 3)
        return self.head(self.dropout(torch.exp(scores)) if self.training else torch.exp(scores))


@dataclass(frozen=True)
class Wrapped:
    module: nn.Module
    class_names: tuple[str, ...] = CLASSES
    image_size: int = 32
    bounds: tuple[Bound, ...] = ()

    def logits(self, images: Images) -> Tensor:
        return self.module(images)

    def features(self, images: Images) -> Tensor:
        raise NotImplementedError

    def head(self) -> nn.Linear:
        raise NotImplementedError

    def bounded(self, bounds: Sequence[Bound]) -> Self:
        raise NotImplementedError

    def copy(self) -> Self:
        raise NotImplementedError

    def fresh(self, seed: int) -> Self:
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())


def make_source(
    labels: list[int], *, mislabeled: tuple[int, ...] = (), bad: tuple[int, ...] = (), size: int = 32
) -> LabelledImages:
    """One grey picture per label; those in ``mislabeled`` show the next class's grey."""
    cells = []
    for row, label in enumerate(labels):
        shown = (label + 1) % 3 if row in mislabeled else label
        buffer = io.BytesIO()
        Image.new("RGB", (size, size), (51 + 76 * shown,) * 3).save(buffer, format="PNG")
        content = buffer.getvalue()
        cells.append({"bytes": content[:30] if row in bad else content, "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return LabelledImages(
        name="greys",
        dataset=datasets.Dataset.from_dict({"image": cells}, features=features),
        ids=[f"g{row}" for row in range(len(labels))],
        labels=np.array(labels, dtype=np.int64),
        class_names=CLASSES,
    )


def run() -> Run:
    return Run(accelerator=Accelerator(cpu=True))


LABELS = [0, 1, 2] * 8


def test_a_clean_net_without_a_manifest() -> None:
    source = make_source(LABELS, mislabeled=(1, 4), bad=(2,))
    result = evaluate_classifier(Wrapped(CornerNet(None)), source, run=run(), batch_size=5)
    assert (result.c_acc.value, result.c_acc.n) == (pytest.approx(100 * 21 / 23), 23)
    assert result.per_class == {"dark": 100.0, "middle": pytest.approx(75.0), "bright": 100.0}
    assert [row.id for row in result.skipped] == ["g2"]
    assert result.asr is result.asr_floor is result.ra is result.asr_excess is result.attack is None


def test_a_backdoored_net_all_to_one() -> None:
    # two bright images look dark: they are the floor, and never fixed by removing the trigger
    source = make_source(LABELS, mislabeled=(2, 5), bad=(1,))
    plan = plan_poisoning(source, "badnet", rate=0.1, target=0)
    result = evaluate_classifier(Wrapped(CornerNet(0)), source, poisoning=plan, run=run(), batch_size=7)
    assert result.asr is not None
    assert result.asr_floor is not None
    assert result.ra is not None
    assert (result.asr.value, result.asr.n) == (100, 15)  # 16 outside the target class, one does not decode
    assert result.asr_floor.value == pytest.approx(100 * 2 / 15)
    assert result.asr_excess == pytest.approx(100 * 13 / 15)
    assert result.ra.value == 0
    assert (result.attack, result.target) == ("badnet", "dark")
    clean = evaluate_classifier(Wrapped(CornerNet(None)), source, poisoning=plan, run=run())
    assert clean.asr is not None
    assert clean.ra is not None
    assert clean.asr.value == pytest.approx(100 * 2 / 15)
    assert clean.asr_excess == 0
    assert clean.ra.value == pytest.approx(100 * 13 / 15)
    assert evaluate_before_after(result, clean) == pytest.approx(100 * (13 / 15 + 1) / 2)


def test_parts_are_measured_one_by_one_and_all_together(tmp_path: Path) -> None:
    source = make_source(LABELS)
    plan = plan_parts(
        source,
        [
            Part(trigger="badnet", target=0, rate=0.1),
            Part(trigger="blended", target=1, rate=0.1, options={"alpha": 0.01}),
            Part(trigger="badnet", target=2, rate=0.1),
        ],
    )
    result = evaluate_classifier(Wrapped(CornerNet(0)), source, poisoning=plan, run=run())
    assert [(part.attack, part.target) for part in result.parts] == [
        ("badnet", "dark"), ("blended", "middle"), ("badnet", "bright"),
    ]  # fmt: skip
    assert [part.asr.value for part in result.parts] == [100, 0, 0]
    assert [part.asr_floor.value for part in result.parts] == [0, 0, 0]
    assert [part.ra.value for part in result.parts] == [0, 100, 50]  # the checker says "dark", which half of them are
    assert result.asr is not None
    assert (result.asr.n, result.asr.value) == (48, pytest.approx(100 / 3))
    assert (result.attack, result.target) == ("badnet + blended + badnet", "dark + middle + bright")
    for part, alone in zip(result.parts, plan.parts, strict=True):
        assert isinstance(alone, Poisoning)
        single = evaluate_classifier(Wrapped(CornerNet(0)), source, poisoning=alone, run=run())
        assert (single.asr, single.asr_floor, single.ra) == (part.asr, part.asr_floor, part.ra)
        assert single.parts == ()
    result.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == result


def test_all_to_all_uses_the_matched_label() -> None:
    plan = plan_poisoning(make_source(LABELS), "badnet", rate=0.1, mode="all-to-all")
    result = evaluate_classifier(Wrapped(CornerNet(0)), make_source(LABELS), poisoning=plan, run=run())
    assert result.asr is not None
    assert result.ra is not None
    assert (result.asr.value, result.asr.n) == (pytest.approx(100 / 3), 24)  # only bright -> dark matches
    assert result.ra.value == pytest.approx(100 / 3)


def test_the_trigger_is_put_on_before_the_resize() -> None:
    """On 128 px images the patch is 12 px wide; the resize to 32 leaves 3 px of it, no longer pure white."""
    source = make_source(LABELS, size=128)
    plan = plan_poisoning(source, "badnet", rate=0.1, target=0)
    for white, expected in ((0.75, 100), (0.95, 0)):
        net = Wrapped(CornerNet(0, white=white))
        result = evaluate_classifier(net, source, poisoning=plan, run=run())
        assert result.asr is not None
        assert result.asr.value == expected
    small = make_source(LABELS)
    at_32 = evaluate_classifier(Wrapped(CornerNet(0, white=0.95)), small, poisoning=plan, run=run())
    assert at_32.asr is not None
    assert at_32.asr.value == 100


def test_the_classifier_is_left_as_it_is(tmp_path: Path) -> None:
    net = CornerNet(0).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    source = make_source(LABELS)
    plan = plan_poisoning(source, "badnet", rate=0.1, target=0)
    cached = Run(accelerator=Accelerator(cpu=True), cache=tmp_path)
    first = evaluate_classifier(Wrapped(net), source, poisoning=plan, run=cached)
    again = evaluate_classifier(Wrapped(net), source, poisoning=plan, run=cached)
    assert (first.c_acc, first.asr, first.ra) == (again.c_acc, again.asr, again.ra)
    assert first.c_acc.value == 100  # dropout was off
    assert net.training
    assert net.dropout.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_evaluations_survive_the_disk(tmp_path: Path) -> None:
    source = make_source(LABELS, bad=(3,))
    plan = plan_poisoning(source, "badnet", rate=0.1, target=0)
    result = evaluate_classifier(Wrapped(CornerNet(0)), source, poisoning=plan, run=run())
    result.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == result


def test_class_names_must_agree_in_order() -> None:
    source = make_source(LABELS)
    swapped = ("middle", "dark", "bright")
    with pytest.raises(DataError, match="another order") as caught:
        evaluate_classifier(Wrapped(CornerNet(0), class_names=swapped), source, run=run())
    assert str(list(swapped)) in caught.value.message
    assert str(list(CLASSES)) in caught.value.message
    with pytest.raises(DataError, match="'cat'"):
        evaluate_classifier(Wrapped(CornerNet(0), class_names=("cat", "dog", "cow")), source, run=run())


def test_a_test_set_of_the_target_class_alone_has_no_attack_success() -> None:
    plan = plan_poisoning(make_source(LABELS), "badnet", rate=0.1, target=0)
    with pytest.raises(NotEnoughDataError, match="outside the target class 'dark'"):
        evaluate_classifier(Wrapped(CornerNet(0)), make_source([0] * 6), poisoning=plan, run=run())


def test_only_like_is_compared_with_like() -> None:
    source = make_source(LABELS)
    plain = evaluate_classifier(Wrapped(CornerNet(0)), source, run=run())
    assert evaluate_before_after(plain, plain) is None
    plan = plan_poisoning(source, "badnet", rate=0.1, target=0)
    attacked = evaluate_classifier(Wrapped(CornerNet(0)), source, poisoning=plan, run=run())
    with pytest.raises(DataError, match="different attack"):
        evaluate_before_after(plain, attacked)


def test_poisoned_labels_are_what_the_source_says() -> None:
    """Accuracy on a poisoned training set falls by the poison that a backdoored net agrees with the attacker on."""
    source = make_source(LABELS)
    plan = plan_poisoning(source, "badnet", rate=0.25, target=0)
    poisoned = apply_poisoning(source, plan)
    assert evaluate_classifier(Wrapped(CornerNet(0)), poisoned, run=run()).c_acc.value == 100
    assert evaluate_classifier(Wrapped(CornerNet(None)), poisoned, run=run()).c_acc.value == 75
