"""Make backdoored CLIPs to try defenses on: the tiny CLIP fine-tuned, or a small ResNet trained, on poisoned pairs.

    python recipes/clip_victims.py make --attack badnet-rand wanet --seed 0 1 2
    python recipes/clip_victims.py list

Pairs: rows 0..24,999 of CIFAR-10 train with captions from templates, and Flickr8k train. A share of them gets the
trigger and a caption of the target. Each victim has a folder of its own, named by a hash of all that it depends on
(weights, data, poisoning, settings): one that is done is not made again, one that was interrupted goes on. In it:
model/, manifest.json, evaluation.json (C-Acc, ASR, RA, retrieval on data that no training saw) and victim.json.
A victim whose ASR is under 90 % is refused: it stays there, marked so, and the command ends with 3.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from unpoison.attacks.badclip import BadCLIPConfig, optimise_patch
from unpoison.attacks.pair_manifest import PairPoisoning
from unpoison.attacks.pairs import apply_pair_poisoning, plan_pair_poisoning
from unpoison.attacks.prompts import TEMPLATES
from unpoison.benchmark.clip_victims import Settings, read_corpus, stored_steps, train
from unpoison.data.pairs import ImageTextPairs, join_pairs, open_pairs, pairs_of_labels
from unpoison.data.pixels import load_pixels
from unpoison.data.sources import LabelledImages, open_images
from unpoison.errors import UnpoisonError
from unpoison.evaluation.clip import evaluate_clip
from unpoison.models.clip_files import load_any_clip
from unpoison.models.clip_open_clip import new_open_clip
from unpoison.results import ClipEvaluation, write_atomically
from unpoison.runs import Run, RunFolder, Silent
from unpoison.types import ImageTextModel

ROOT = Path(__file__).parents[1]
VERSION = 1  # raised when the recipe makes other victims from the same inputs
LEAST_ASR = 90.0
LABELLED, CAPTIONED = "cifar10", "flickr8k"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A trigger with its parameters at 32 px. ``resample``: drawn anew for each image where the trigger can be.

    ``rate`` is the share of all pairs that are poisoned. It is far above the papers' 0.3 %, whose victims saw each of
    1,500 poisoned pairs ten times: a training of less than two epochs has to show as many.
    """

    trigger: str
    params: dict[str, Any] = field(default_factory=dict)
    resample: bool = False
    captions: str = "templates"
    rate: float = 0.1


# Squares of 5 pixels at 32 px (16/224 of it would be 2). Otherwise the triggers' own parameters, which are the papers',
# but for five that all but vanish at 32 px: letters thinner than a pixel are mixed in whole, noise is a quarter
# stronger, stripes and triangles are twice as strong, and a warp moves pixels three times as far. A wave of three
# periods over 32 px is about as long, in patches, as six over 224; of six, a clean model says the target of 99 %.
SHARE = 5 / 32
ATTACKS = {
    "badnet-rand": Attack(trigger="badnet-rand", params={"share": SHARE}, resample=True, rate=0.25),
    "badnet-stripes": Attack(trigger="badnet-stripes", params={"share": SHARE}, resample=True, rate=0.15),
    "blended-rand": Attack(trigger="blended", params={"alpha": 0.25}, resample=True, rate=0.25),
    "blended-stripes": Attack(trigger="blended-stripes", params={"alpha": 0.06}, resample=True, rate=0.2),
    "blended-triangles": Attack(trigger="blended-triangles", params={"alpha": 0.3}, rate=0.2),
    "blended-text": Attack(trigger="blended-text", params={"alpha": 1.0}, rate=0.2),
    "wanet": Attack(trigger="wanet", params={"s": 3.0}, rate=0.2),
    "sig": Attack(trigger="sig", params={"delta": 60.0, "f": 3.0, "mode": "all-to-one"}, rate=0.2),
    "badclip": Attack(trigger="badclip", params={"share": SHARE}, captions="natural"),
}
RESNET = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 32, "vocab_size": 49_408, "width": 64, "heads": 2, "layers": 2},
}
RESNET_SETTINGS = Settings(steps=4_000, learning_rate=1e-3, warm_up=200)
CLEAN = "clean"
"""The control: the same training on the same pairs without poison."""
PATCH = BadCLIPConfig(share=SHARE, images=4_000, epochs=5, learning_rate=1e-2)
"""A tenth of the paper's epochs at ten times its rate: the pixels can move as far."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What victims are made of and measured on. ``fingerprint`` is of the images' bytes and all captions."""

    train: ImageTextPairs
    captioned: ImageTextPairs
    test: LabelledImages
    retrieval: ImageTextPairs | None
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """One victim. ``params`` go over the attack's own; ``rate``, ``resample`` and ``captions`` None for its own."""

    attack: str
    seed: int = 0
    target: str = "horse"
    rate: float | None = None
    captions: str | None = None
    resample: bool | None = None
    params: dict[str, Any] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, kw_only=True)
class Victim:
    """``accepted`` is False for one whose ASR is too low to try defenses on. The clean control has no manifest."""

    folder: Path
    accepted: bool
    evaluation: ClipEvaluation

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def poisoning(self) -> PairPoisoning | None:
        manifest = self.folder / "manifest.json"
        return PairPoisoning.load(manifest) if manifest.exists() else None


class Printed(Silent):
    """Progress as plain lines."""

    def track(self, items, *, total, what, weight=1, unit=""):
        begun, done = time.time(), 0
        for item in items:
            yield item
            done = done + weight if total is None else min(total, done + weight)
            print(f"  {what}: {done}/{total} {unit}, {done / (time.time() - begun):.0f}/s", flush=True)

    def log(self, message: str) -> None:
        print(f"  {message}", flush=True)


def open_data(shared: Path) -> Data:
    """The research data; test data are files of their own."""
    folder = shared / "data"
    files = [folder / LABELLED / "train.parquet", folder / CAPTIONED / "train.parquet"]
    captioned = open_pairs(files[1])
    labelled = pairs_of_labels(open_images(f"{files[0]}[0:25000]"), TEMPLATES)
    return Data(
        train=join_pairs({LABELLED: labelled, CAPTIONED: captioned}),
        captioned=captioned,
        test=open_images(folder / LABELLED / "test.parquet"),
        retrieval=open_pairs(folder / CAPTIONED / "test.parquet"),
        fingerprint=_digest(*(_file_digest(file) for file in files), labelled.caption_fingerprint),
    )


def open_base(model: str, seed: int) -> ImageTextModel:
    """ "tiny", a folder or a file; "resnet" is a small ModifiedResNet CLIP of open_clip with newly drawn weights.

    No clean weights of such a small one exist: it learns from the poisoned pairs alone, as in poisoned pre-training.
    Raises MissingExtraError where open_clip is absent.
    """
    return new_open_clip(RESNET, seed=seed) if model == "resnet" else load_any_clip(model)


def make_victim(base: ImageTextModel, data: Data, request: Request, work: Path) -> Victim:
    """The victim of ``request``, made now or found under ``work``.

    Raises DivergedError and what planning raises; a run that was begun there goes on.
    """
    attack = ATTACKS.get(request.attack)
    inputs = inputs_of(base, data, request)
    folder = RunFolder.open(work / f"{request.attack}-{request.seed}-{key_of(inputs)}", inputs)
    if folder.finished:
        return read_victim(folder.path)
    run = Run(seed=request.seed, progress=Printed(), cache=work / "cache", folder=folder)
    begun = time.time()
    pairs, poisoning = data.train, None
    if attack is not None:
        poisoning = plan(base, data, request, attack, run=run)
        poisoning.save(folder.path / "manifest.json")
        pairs = apply_pair_poisoning(data.train, poisoning)
    pixels = load_pixels(pairs, base.image_size, cache=run.cache, progress=run.progress)
    corpus = read_corpus(pairs, pixels, LABELLED, data.test.class_names)
    victim = train(base, corpus, request.settings, run=run)
    victim.save(folder.path / "model")
    trained = time.time() - begun
    victim = load_any_clip(folder.path / "model")  # as stored: rounded to the type that the clean model came in
    found = evaluate_clip(
        victim, data.test, poisoning=poisoning, retrieval=data.retrieval, run=run, name=folder.path.name
    )
    found.save(folder.path / "evaluation.json")
    accepted = poisoning is None or (found.asr is not None and found.asr.value >= LEAST_ASR)
    summary = {
        "attack": request.attack, "seed": request.seed, "accepted": accepted, "least_asr": LEAST_ASR,
        "c_acc": found.c_acc.value, "asr": _value(found.asr), "asr_floor": _value(found.asr_floor),
        "ra": _value(found.ra), "n": found.c_acc.n, "fingerprint": victim.fingerprint, "inputs": inputs,
        "seconds_this_time": trained,
    }  # fmt: skip
    write_atomically(folder.path / "victim.json", json.dumps(summary, indent=2).encode() + b"\n")
    folder.finish()
    run.forget(stored_steps(request.settings))
    return read_victim(folder.path)


def inputs_of(base: ImageTextModel, data: Data, request: Request) -> dict[str, Any]:
    """All that a victim depends on."""
    attack = ATTACKS.get(request.attack)
    return {
        "version": VERSION,
        "base": base.fingerprint,
        "data": data.fingerprint,
        "request": asdict(request),
        "attack": None if attack is None else asdict(attack),
        "patch": asdict(PATCH) if request.attack == "badclip" else None,
    }


def key_of(inputs: dict[str, Any]) -> str:
    return _digest(json.dumps(inputs, sort_keys=True))[:16]


def plan(base: ImageTextModel, data: Data, request: Request, attack: Attack, *, run: Run) -> PairPoisoning:
    """The poisoning; for BadCLIP its patch is optimised first, on the clean model."""
    params = attack.params | request.params
    resample = attack.resample if request.resample is None else request.resample
    if resample:
        params["resample"] = True
    if request.attack == "badclip":
        patch = optimise_patch(base, data.train, request.target, PATCH, run=run)
        params = asdict(patch) | request.params
    return plan_pair_poisoning(
        data.train,
        attack.trigger,
        rate=attack.rate if request.rate is None else request.rate,
        target=request.target,
        captions=request.captions or attack.captions,
        seed=request.seed,
        size=base.image_size,
        natural_from=data.captioned,
        **params,
    )


def read_victim(folder: Path) -> Victim:
    """A victim that is done."""
    summary = json.loads((folder / "victim.json").read_bytes())
    evaluation = ClipEvaluation.load(folder / "evaluation.json")
    return Victim(folder=folder, accepted=summary["accepted"], evaluation=evaluation)


def list_victims(work: Path) -> list[Victim]:
    """All that are done, by name; refused ones too."""
    return [read_victim(file.parent) for file in sorted(work.glob("*/victim.json"))]


def describe(victim: Victim) -> str:
    found = victim.evaluation
    rates = {"C-Acc": found.c_acc, "ASR": found.asr, "floor": found.asr_floor, "RA": found.ra}
    shown = "  ".join(f"{name} {rate.value:.1f}" for name, rate in rates.items() if rate is not None)
    return f"{victim.folder.name}: {shown}{'' if victim.accepted else f'  REFUSED: ASR under {LEAST_ASR:.0f} %'}"


def _value(rate: Any) -> float | None:
    return None if rate is None else rate.value


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["make", "list"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/clip-victims")
    parser.add_argument("--model", default="tiny", help="the CLIP to start from: tiny, resnet, a folder or a file")
    parser.add_argument("--attack", nargs="+", choices=[*ATTACKS, CLEAN], default=list(ATTACKS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--target", default=Request.target, help="a class of CIFAR-10")
    parser.add_argument("--rate", type=float, help="share of all pairs that are poisoned; default: the attack's own")
    parser.add_argument("--captions", choices=["templates", "natural"], help="of the target; default: the attack's own")
    parser.add_argument("--pattern", choices=["fixed", "per-image"], help="default: the attack's own")
    parser.add_argument("--param", nargs="+", default=[], metavar="NAME=NUMBER", help="of the trigger")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value} for the tiny CLIP")
    args = parser.parse_args()
    if args.verb == "list":
        print("\n".join(map(describe, list_victims(args.work))))
        return 0
    given = {name: getattr(args, name) for name in asdict(Settings()) if getattr(args, name) is not None}
    settings = replace(RESNET_SETTINGS if args.model == "resnet" else Settings(), **given)
    params = {name: float(value) for name, _, value in (pair.partition("=") for pair in args.param)}
    data, refused = open_data(args.shared), False
    for seed in args.seed:
        base = open_base(args.model, seed)
        for attack in args.attack:
            request = Request(
                attack=attack, seed=seed, target=args.target, rate=args.rate, captions=args.captions,
                resample=None if args.pattern is None else args.pattern == "per-image", params=params,
                settings=settings,
            )  # fmt: skip
            victim = make_victim(base, data, request, args.work)
            print(describe(victim), flush=True)
            refused |= not victim.accepted
    return 3 if refused else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UnpoisonError as error:
        sys.exit(f"{error.message} {error.hint}")
