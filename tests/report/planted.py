"""Run folders with planted numbers, written with the real result classes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from unpoison.clip_results import ClipPurification
from unpoison.model_results import DataVerdict, FileVerdict, ModelScan, WeightsVerdict
from unpoison.results import (
    CLEAN,
    MIXED,
    SKIPPED,
    SUSPECT,
    ClipEvaluation,
    DatasetScan,
    Drift,
    Evaluation,
    Interval,
    PoisonEstimate,
    Purification,
    Recall,
    SampleScores,
    SkippedRow,
    Split,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HOSTILE_CLASSES = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(2)</script>",
    "$\\frac{1}{2}$ & $5",
    "'\"><svg onload=alert(3)>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:alert(4)",
    "a]]></style></script><!--",
    "\u202egnp.exe\x00\x1b[31m",
    "Straßenbahn 電車 🚋",
    "n" * 300,
)
N = 10_000
SIGMA1, SIGMA2 = 0.2, 0.1
NOT_COVERED = (
    "Images whose labels are right and whose pixels are untouched: nothing can be learnt from them about a backdoor.",
    "Triggers that CLIP itself was poisoned with.",
)


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values.argsort().argsort() + 1) / len(values)


def scores_and_split(
    class_names: tuple[str, ...], *, poisoned: bool, published: bool = False, seed: int = 0
) -> tuple[SampleScores, Split, PoisonEstimate]:
    """5 % of label 0 planted in the corner when ``poisoned``; three rows are skipped."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(class_names), N)
    hardness = random.normal(size=N)
    clip = 0.7 * hardness + 0.7 * random.normal(size=N)
    early = -0.7 * hardness + 0.7 * random.normal(size=N)
    if poisoned:
        bad = random.choice(N, N // 20, replace=False)
        labels[bad] = 0
        clip[bad] = random.normal(2.3, 0.7, len(bad))
        early[bad] = random.normal(2.8, 0.4, len(bad))
    clip, early = _ranks(clip), _ranks(early)
    region = np.full(N, CLEAN, np.int8)
    if poisoned and not published:
        region[(clip > 0.8) & (early > 0.8)] = MIXED
        region[(clip > 0.85) & (early > 0.9)] = SUSPECT
    elif poisoned:
        region[(clip > 1 - SIGMA1) | (early > 1 - SIGMA1)] = MIXED
        region[(clip > 1 - SIGMA2) | (early > 1 - SIGMA2)] = SUSPECT
    clip[:3], early[:3], region[:3] = np.nan, np.nan, SKIPPED
    ids = [f"train-00000-of-00001:{row}" for row in range(N)]
    estimate = PoisonEstimate(
        poisoned=poisoned,
        rate=0.05 if poisoned else 0.0,
        rate_low=0.046 if poisoned else 0.0,
        rate_high=0.054 if poisoned else 0.003,
        target_labels=(0,) if poisoned else (),
        evidence={"corner_ratio": 2.91 if poisoned else 0.06, "target_rank_correlation": -0.07 if poisoned else 0.61},
        reason="286 images lie in the corner, 2.9 times what independence predicts."
        if poisoned
        else "6 images lie in the corner, 0.06 times what independence predicts.",
    )
    scores = SampleScores(
        method="cgd",
        ids=ids,
        labels=labels,
        class_names=class_names,
        axes={"clip_rank": clip, "early_rank": early, "joint_rank": np.minimum(clip, early)},
        primary="joint_rank",
        skipped=skipped_rows(3),
    )
    split = Split(method="cgd", ids=ids, labels=labels, region=region, class_names=class_names, estimate=estimate)
    return scores, split, estimate


def skipped_rows(number: int) -> tuple[SkippedRow, ...]:
    return tuple(SkippedRow(id=f"train-00000-of-00001:{row}", reason="the image is truncated") for row in range(number))


def write_scan(
    folder: Path,
    *,
    poisoned: bool = True,
    class_names: tuple[str, ...] = CLASSES,
    source: str = "data/cifar10_poisoned.parquet",
    skipped: int = 3,
    samples: bool = True,
    clip_agreement: float = 74.2,
) -> Path:
    """A folder as ``unpoison scan dataset`` leaves it."""
    folder.mkdir(parents=True)
    scores, split, estimate = scores_and_split(class_names, poisoned=poisoned)
    flagged = np.bincount(split.labels[split.suspect], minlength=len(class_names))
    scan = DatasetScan(
        source=source,
        method="cgd",
        samples=N,
        class_names=class_names,
        estimate=estimate,
        flagged=len(split.suspect),
        flagged_per_class={name: int(flagged[at]) for at, name in enumerate(class_names)},
        skipped=skipped_rows(skipped),
        clip="tiny",
        clip_agreement=clip_agreement,
        chance_agreement=10.0,
        warnings=(f"CLIP agrees with only 31.0 % of the labels of the class '{class_names[3]}'.",),
        not_covered=NOT_COVERED,
        seconds=187.4,
        seed=0,
        config={
            "regions": "estimated",
            "sigma1": SIGMA1,
            "sigma2": SIGMA2,
            "clip_logit_scale": 100.0,
            "rank_within": "dataset",
            "scorers": 3,
        },
        inputs={"clip": "blake2b:5f2c9a1e0d77", "source": "blake2b:0a4be91c2d3f"},
    )
    scan.save(folder / "scan.json")
    scores.save(folder / "scores.parquet")
    split.save(folder / "split.parquet")
    inputs = {"command": "scan dataset", "source": source, "clip": "tiny", "seed": 0}
    (folder / "run.json").write_text(json.dumps(inputs))
    if samples:
        (folder / "samples.json").write_text(json.dumps(example_samples(scores, split)))
    (folder / "finished.json").write_text("{}")
    return folder


def write_model_scan(folder: Path) -> Path:
    """A folder as ``unpoison scan model --trained-on`` leaves it: weights without evidence, poisoned training data."""
    data = DatasetScan.load(write_scan(folder / "data") / "scan.json")
    weights = WeightsVerdict(
        word="no evidence", reason="No class is reached by a change that is out of line.", images=480,
        method="class-wise inversion", image_source="480 images", covered=100.0,
    )  # fmt: skip
    file = FileVerdict(word="accepted", reason="safetensors with no code.", format="safetensors", sha256="0" * 64)
    verdict = DataVerdict(reason=data.estimate.reason, scan=data, asked=True)
    scan = ModelScan(model="model", kind="classifier", file=file, data=verdict, weights=weights)
    scan.save(folder / "model-scan.json")
    return folder


def write_purification(
    folder: Path,
    *,
    accepted: bool = True,
    evaluated: bool = True,
    class_names: tuple[str, ...] = CLASSES,
) -> Path:
    """A folder as ``unpoison purify cgd`` leaves it."""
    folder.mkdir(parents=True)
    scores, split, estimate = scores_and_split(class_names, poisoned=True, published=True)
    random = np.random.default_rng(1)
    history = [
        {
            "step": float(step),
            "loss": 0.9 * 0.99**step + 0.3 + 0.02 * random.random(),
            "unlearn": -6 + 5 * 0.98**step,
            "held_out_accuracy": 74.6 - 0.8 * 0.97**step + 0.2 * random.random(),
        }
        for step in range(0, 301, 10)
    ]
    purification = Purification(
        method="cgd",
        config={
            "regions": "published",
            "alpha": 5e-4,
            "beta": 0.025,
            "tau": 3.0,
            "sigma1": SIGMA1,
            "sigma2": SIGMA2,
            "max_steps": 300,
        },
        accepted=accepted,
        reason="Held-out accuracy fell by 0.3 points, within the bound of 1.0."
        if accepted
        else "Held-out accuracy fell by 4.1 points, past the bound of 1.0.",
        protects="the weights: all layers were trained, and the classifier works as before.",
        held_out_before=74.9,
        held_out_after=74.6 if accepted else 70.8,
        bound=1.0,
        steps=300,
        changed_share=0.998,
        seconds=94.2,
        seed=0,
        suspect_count=len(split.suspect),
        clean_count=len(split.clean),
        estimate=estimate,
        history=history,
        inputs={"model": "blake2b:77aa01d2", "clip": "blake2b:5f2c9a1e0d77"},
        before=evaluation(before=True, class_names=class_names) if evaluated else None,
        after=evaluation(before=False, class_names=class_names) if evaluated else None,
        not_covered=NOT_COVERED,
    )
    purification.save(folder / "purification.json")
    scores.save(folder / "scores.parquet")
    split.save(folder / "split.parquet")
    (folder / "samples.json").write_text(json.dumps(example_samples(scores, split)))
    return folder


def evaluation(*, before: bool, class_names: tuple[str, ...] = CLASSES, attack: bool = True) -> Evaluation:
    rates = (74.5, 99.0, 2.4, 0.9) if before else (74.1, 2.8, 2.5, 72.0)
    c_acc, asr, floor, ra = rates
    return Evaluation(
        model="victim/" if before else "purified/model",
        data="data/cifar10_test.parquet",
        c_acc=Interval(value=c_acc, low=c_acc - 0.9, high=c_acc + 0.8, n=10_000),
        asr=Interval(value=asr, low=asr - 0.3, high=min(asr + 0.2, 100), n=9_000) if attack else None,
        asr_floor=Interval(value=floor, low=floor - 0.3, high=floor + 0.3, n=9_000) if attack else None,
        asr_excess=asr - floor if attack else None,
        ra=Interval(value=ra, low=max(ra - 0.9, 0), high=ra + 0.9, n=9_000) if attack else None,
        attack="badnet" if attack else None,
        target=class_names[0] if attack else None,
        per_class={name: 60.0 + 3 * at for at, name in enumerate(class_names)},
        seconds=6.3,
    )


def write_clip_purification(
    folder: Path,
    *,
    accepted: bool = True,
    evaluated: bool = True,
    attack: bool = True,
    left: bool = False,
    name: str = "",
) -> Path:
    """A folder as ``unpoison purify par`` leaves it; ``name`` is a stranger's string in every place that takes one."""
    folder.mkdir(parents=True)
    looks = [
        {
            "step": float(step),
            "held_out_accuracy": 60.0 - 5 * 0.99**step,
            "chance": 1.0,
            "image_cosine": 0.99**step,
            "text_cosine": 0.9 + 0.1 * 0.99**step,
            "loss": 2 - step / 400,
            "image_open": float(step < 200),
        }
        for step in range(0, 601, 100)
    ]
    purification = ClipPurification(
        method="par",
        config={"tau": 2.15, "batch_size": 128, "erase_area": [0.005, 0.01], name: name},
        accepted=accepted,
        reason="Held-out pairs find each other in 60.0 percent of cases, 61.0 before."
        if accepted
        else "par diverged at step 412: loss nan. The weights of step 400 were kept.",
        protects="both towers' weights",
        bound=10.0,
        steps=600 if accepted else 400,
        planned_steps=600,
        batch_size=128,
        seconds=94.2,
        seed=3,
        held_out_before=61.0,
        held_out_after=60.0,
        chance=1.0,
        image_cosine=-0.08,
        text_cosine=0.91,
        trained_pairs=4750,
        held_out_pairs=250,
        truncated_captions=7,
        stopped="" if accepted else "par diverged at step 412: loss nan.",
        warnings=(f"The image embeddings moved: mean cosine with the given model's is -0.08. {name}",),
        skipped=(SkippedRow(id=f"pairs:4{name}", reason="the image is truncated"),),
        history=looks,
        inputs={"model": "blake2b:77aa01d2", "pairs": f"flickr8k{name}", "torch": "2.13.0"},
        before=clip_evaluation(before=True, attack=attack, left=left, name=name) if evaluated else None,
        after=clip_evaluation(before=False, attack=attack, left=left, name=name) if evaluated else None,
        not_covered=NOT_COVERED,
        command=f"unpoison purify par model --pairs 'flickr 8k' --seed 3{name}",
    )
    purification.save(folder / "purification.json")
    return folder


def clip_evaluation(*, before: bool, attack: bool = True, left: bool = False, name: str = "") -> ClipEvaluation:
    c_acc, asr, floor, ra = (57.5, 99.0, 2.0, 1.0) if before else (55.1, 40.0 if left else 3.0, 2.5, 50.0)

    def at(value: float, n: int) -> Interval:
        return Interval(value=value, low=value - 1, high=value + 1, n=n)

    recall = Recall(at_1=at(31.0 if before else 29.0, 800), at_5=at(55.0, 800), at_10=at(66.0, 800))
    return ClipEvaluation(
        model=f"suspect{name}" if before else f"out/model{name}",
        data=f"cifar10 test{name}",
        templates=7,
        c_acc=at(c_acc, 10_000),
        asr=at(asr, 9000) if attack else None,
        asr_floor=at(floor, 9000) if attack else None,
        asr_excess=asr - floor if attack else None,
        ra=at(ra, 9000) if attack else None,
        attack=f"badnet-stripes{name}" if attack else None,
        target=f"airplane{name}" if attack else None,
        retrieval_data=f"flickr8k test{name}",
        image_to_text=recall,
        text_to_image=recall,
        retrieval_asr=at(90.0 if before else 4.0, 700) if attack else None,
        retrieval_asr_floor=at(3.0, 700) if attack else None,
        drift=None
        if before
        else Drift(
            image_raw=-0.081,
            image_aligned=0.612,
            text_raw=0.907,
            text_aligned=0.955,
            images=10_000,
            texts=5000,
            width=512,
        ),
    )


def example_samples(scores: SampleScores, split: Split) -> list[dict[str, object]]:
    """The 48 most suspicious images and 12 clean ones."""
    worst = np.fmin(scores.axes["clip_rank"], scores.axes["early_rank"])
    order = np.argsort(-np.nan_to_num(worst))
    chosen = [*order[:48], *order[-400:-388]]
    return [
        {
            "id": scores.ids[row],
            "label": scores.class_names[scores.labels[row]],
            "clip_label": scores.class_names[(scores.labels[row] + 1 + row % 8) % len(scores.class_names)],
            "region": {CLEAN: "clean", MIXED: "mixed", SUSPECT: "suspect"}[int(split.region[row])],
            "thumbnail": base64.b64encode(picture(int(row))).decode(),
            "clip_rank": float(scores.axes["clip_rank"][row]),
            "early_rank": float(scores.axes["early_rank"][row]),
        }
        for row in chosen
    ]


def picture(seed: int) -> bytes:
    """A 32 px PNG: a soft color field with a checker in the corner."""
    random = np.random.default_rng(seed)
    rough = random.integers(30, 225, (4, 4, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(rough).resize((32, 32), Image.Resampling.BICUBIC))
    pixels[29:, 29:] = 255 * (np.indices((3, 3)).sum(0) % 2)[..., None]
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, format="PNG")
    return sink.getvalue()
