"""What a grid's tables may say: data, models, attacks, methods, limits, and the products of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from unpoison.errors import ConfigError, LabelRangeError, UnknownMethodError

ModelKind = Literal["classifier", "clip"]
Precision = Literal["no", "bf16", "fp16"]
"""In which CLIPs are trained: accelerate's mixed precision."""
CLEAN = "clean"
"""The attack that is none: the control of every table."""
GIVEN = "none"
"""The method that is none: the victim as it is given, before any defense."""
MEAN = "mean"
"""In the figures of papers: over all attacks of the paper."""
MOST = "at-most"
"""In the figures of papers: a bound on the ASR of each of its attacks."""
MADE_AGAINST_DEFENSES = ("low-gap", "feature-small")
"""Triggers whose whole purpose is to get past a defense of this package."""
KNOWN_ADAPTIVE = (*MADE_AGAINST_DEFENSES, "boundary", "aligned", "through-par")
"""What grids call adaptive attacks: for plans that were written before a plan said which of its cells are."""
SHOTS = "clean labelled shots"
"""What the catalog calls the images that ``shots`` gives."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """One data set. Sources are written as for ``unpoison scan dataset``.

    ``train``: labelled images to be poisoned; a CLIP gets them with captions from templates. ``test``: clean labelled
    images for every rate. ``target``: the attack's class, by name or number. For a CLIP also: ``captioned``,
    image-caption pairs that join ``train`` or stand in for it; ``clean``, labelled images, and ``clean_captioned``,
    pairs, to repair it on (without either: what it was trained on, before the poisoning); ``retrieval``, pairs for R@k;
    ``shots``, labelled images, of which the methods that repair a zero-shot classifier get a few of each class;
    ``later``, clean labelled images that a repaired CLIP is fine-tuned on for an epoch, to see the attack come back.
    """

    test: str
    train: str | None = None
    target: str | int = 0
    captioned: str | None = None
    clean: str | None = None
    clean_captioned: str | None = None
    retrieval: str | None = None
    shots: str | None = None
    later: str | None = None

    def sources(self) -> dict[str, str]:
        """Every source by its key."""
        keys = ("train", "test", "captioned", "clean", "clean_captioned", "retrieval", "shots", "later")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model and how its victims are trained.

    ``kind`` "classifier": a new network of ``arch`` at ``image_size`` pixels, ``epochs`` at ``learning_rate``.
    ``kind`` "clip": ``model`` (as ``unpoison purify par`` takes it) fine-tuned as ``victim`` says
    (`unpoison.benchmark.clip_victims.Settings`). ``clip``: the reference that methods may ask. ``scores``: how CGD's
    ranks, which most repairs of classifiers start from, are made (`SeparationConfig`). ``gpus``: of Ray.
    """

    kind: ModelKind
    arch: str = "small-resnet"
    image_size: int = 32
    epochs: int = 15
    learning_rate: float = 0.1
    augment: bool = True
    model: str = "tiny"
    victim: dict[str, Any] = field(default_factory=dict)
    clip: str = "tiny"
    scores: dict[str, Any] = field(default_factory=dict)
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size", "epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        if not self.gpus >= 0:
            raise ConfigError(f"gpus must be 0 or more, got {self.gpus}.", hint="0.5: two cells share a GPU.")


@dataclass(frozen=True, kw_only=True)
class FurtherPart:
    """A second backdoor in the same set, on samples of its own: ``rate`` is a share of the whole set, in (0, 1]."""

    trigger: str
    target: str | int
    rate: float
    params: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    resample: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ConfigError(f"a rate must be in (0, 1], got {self.rate}.", hint="A rate of 0.05 is 5 percent.")


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """A trigger of the catalog; ``params`` are its own, ``mode`` the labeling, ``captions`` the target's captions.

    ``most_captions``: no more different natural captions than these, drawn from the seed (all where it is left out).
    ``resample``: a new pattern for each image, where the trigger can. ``prepare``: settings of the training that some
    triggers have first (`unpoison.benchmark.prepare`). ``through_par``: badclip's patch is trained through PAR.
    ``select``: what is poisoned is chosen with the attacker's own clean CLIP, the model's ``clip`` for a classifier and
    its ``model`` for a CLIP: "boundary" for labelled images, "captions" for pairs; "aligned" captions ask it too.
    """

    trigger: str
    params: dict[str, Any] = field(default_factory=dict)
    mode: str | None = None
    resample: bool = False
    captions: Literal["templates", "natural", "aligned"] = "templates"
    select: Literal["random", "boundary", "captions"] = "random"
    through_par: bool = False
    prepare: dict[str, Any] = field(default_factory=dict)
    also: tuple[FurtherPart, ...] = ()
    most_captions: int | None = None

    def __post_init__(self) -> None:
        if self.most_captions is not None and self.most_captions < 1:
            raise ConfigError(f"most_captions must be 1 or more, got {self.most_captions}.", hint="Try 128.")
        if self.most_captions is not None and self.captions != "natural":
            raise ConfigError(f"most_captions is for natural captions, not {self.captions}.", hint="Leave it out.")

    @property
    def adaptive(self) -> bool:
        """Whether it is made against a defense: by its choice of samples or captions, or by how its trigger is
        trained."""
        chosen = self.select != "random" or self.captions == "aligned"
        return chosen or self.through_par or self.trigger in MADE_AGAINST_DEFENSES

    def inputs(self) -> dict[str, Any]:
        """What a cell's name depends on; a key that came later counts where it is used."""
        body = asdict(self)
        for key in ("also", "most_captions"):
            if not body[key]:
                del body[key]
        return body


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """A defense of the catalog; ``config`` goes over its own defaults, or over the paper's with ``published``.

    The learning rates of CLIP methods are scaled to the model either way.
    """

    method: str
    published: bool = False
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one cell may take: wall ``seconds``, resident ``memory`` in MiB, ``threads``."""

    seconds: float = 3600.0
    memory: int = 16_384
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "threads"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")


@dataclass(frozen=True, kw_only=True)
class Product:
    """Every combination of these names is a cell. ``rate``: shares of the training set that are poisoned, in (0, 1]."""

    data: tuple[str, ...]
    model: tuple[str, ...]
    attack: tuple[str, ...]
    rate: tuple[float, ...] = (0.05,)
    method: tuple[str, ...]
    seed: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What a paper reports of a method of the grid, in percent by the grid's names of the attacks, ``mean`` for a
    figure over all of the paper's, ``at-most`` for a bound on the ASR of each of them.

    ``setting``: its models and data in a few words; ``source``: the paper, and where in it.
    """

    method: str
    setting: str
    source: str
    asr: dict[str, float] = field(default_factory=dict)
    c_acc: dict[str, float] = field(default_factory=dict)


def class_number(target: str | int, class_names: Sequence[str]) -> int:
    """A class given by name or number. Raises UnknownMethodError for a name that is none, LabelRangeError."""
    if isinstance(target, str):
        if target not in class_names:
            raise UnknownMethodError(target, class_names, kind="class")
        return list(class_names).index(target)
    if not 0 <= target < len(class_names):
        raise LabelRangeError(
            f"target {target} is outside the {len(class_names)} classes.",
            hint=f"Give a number from 0 to {len(class_names) - 1}, or a name.",
        )
    return target
