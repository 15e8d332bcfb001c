"""CBPT: move the classes of a zero-shot classifier so that a trigger no longer names them; no weight is touched.

Paper
    Kong, Fang, Guo, Qing, Gao, Chen, Xia, Xu. "Neural Antidote: Class-Wise Prompt Tuning for Purifying Backdoors in
    CLIP." arXiv 2502.19269. No code is public.
Idea
    A trigger sends images into a region of the embedding space that the target's text sits in. Find a trigger that
    does so (a dummy for the true one), then move the classes until images with the dummy get their own class back.
    Both towers stay as they are.
Needs
    The suspicious CLIP, class names and a few clean labelled images of each class.
Protects
    One zero-shot classifier: these class embeddings. Retrieval, captions and other class lists stay attackable.
Steps
    1. h_k: mean text embedding of class k over templates; the suspect's zero-shot classifier.
    2. Target y*: the class that a patch out of line reaches (:mod:`unpoison.detection.trigger_search`), or the one
       given. Searched for twice where one is suspected. None: the classifier is returned as it is, to the bit.
    3. Dummy triggers A toward y* (:mod:`unpoison.defenses.dummies`): the least changes that work, and loud ones.
    4. Class embeddings g_k, begun at h_k. z(x) and z(A(x)) are computed once, in ``views`` shifts and mirrorings.
       L = clean_weight KL(opinion(x) || p(x)) + trigger_weight CE(p(A(x)), wanted) - suppress_weight log(1 -
       q_y*(A(x))) + align_weight mean_k (1 - cos(g_k, h_k)), p = softmax(s z g); opinion: p with h; wanted: half the
       label, half the opinion of the plain image; q: p with the target's cosine raised by ``margin``.
    5. Adam 0.01, cosine, 300 steps; a dummy and a view drawn for each.
    6. With ``rounds``: invert again against the tuned classes while that reaches at least 5 % of the shots, and tune
       again with all dummies.
    7. Accepted where held-out accuracy holds and neither these dummies nor one kept aside work on held-out images.
Where we differ, and what the paper leaves open
    Of the paper only the idea, the two stages and that there are three losses are known to us; all constants are ours.
    :meth:`CBPTConfig.as_published` is the plain reading: token prompts v_k [m, w] before each name with g_k the text
    embedding of [v_k; name_k]; one dummy by InfoNCE; L = CE(p(x), y) + CE(p(A(x)), y) + mean_k (1 - cos(g_k, h_k)); by
    SGD.
    The default tunes the class embeddings themselves, which prompts can only approach, adds the loss that pushes y* off
    the dummies, and asks of clean images that nothing changes rather than that few labels are learnt by heart
    (docs/decisions/0007-classes-instead-of-prompts.md). The search looks for one form of trigger, not for a mask and
    pattern beside it (docs/decisions/0005-search-before-repair.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from unpoison.defenses.class_prompts import ClassCarrier, ClassPrompts, FreeClasses, all_classes, choose_classes
from unpoison.defenses.dummies import contrast, excess, invert, loud, noise, quiet, see
from unpoison.defenses.shots import Shots, accuracy, embed
from unpoison.detection.inversion import InversionConfig, InvertedTrigger
from unpoison.detection.trigger_search import TriggerSearchConfig
from unpoison.errors import ConfigError, DivergedError
from unpoison.models.logit_scale import usable_scale
from unpoison.runs import Run
from unpoison.schedules import cosine, set_rate
from unpoison.types import Embeddings, ImageTextModel, TokenEmbeddings

_FORMS: tuple[Literal["additive", "patch"], ...] = ("additive", "patch")
_OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True, kw_only=True)
class CBPTConfig:
    """All numbers are ours: the paper's are not public. What tunes was chosen on victims of a seed that no table shows
    (docs/decisions/0007-classes-instead-of-prompts.md has the trials: dummies, ``loud``, the weights, ``margin`` and
    ``rounds``); when ``search`` suspects, on victims of seeds 0 and 1 and three clean models (docs/decisions/0005)."""

    shots: int = 16
    """Labelled images of each class: all that any label is learnt from, and all that dummies are inverted on. Other
    labelled images judge (at most 64 a class), and nothing is fitted to those."""
    tune: Literal["classes", "prompts"] = "classes"
    """The class embeddings themselves, or token prompts before each name."""
    context: str = "a photo of a"
    """The words whose token embeddings the prompts begin with; their number is m."""
    shared: bool = False
    """One set of token prompts for all classes: what class-wise ones are compared with."""
    delta: Literal["inverted", "random", "none"] = "inverted"
    """What the dummies show. Random signs as large as ``loud`` (or ``epsilon`` by InfoNCE), or no dummy at all and so
    the losses on clean images alone, are what inversion is compared with."""
    dummies: Literal["several", "contrast"] = "several"
    """Two quiet and the loud ones by cross-entropy, or one by InfoNCE, of the form that reaches more."""
    loud: tuple[float, ...] = (32 / 255, 64 / 255)
    """epsilon of each loud dummy: the true trigger's shift in the embedding space lies between theirs and the quiet
    ones' (docs/decisions/0007)."""
    loud_steps: int = 60
    forms: tuple[Literal["additive", "patch"], ...] = _FORMS
    """Forms that the dummy by InfoNCE is inverted in, a bounded universal change and a mask with a pattern; the one
    that reaches more stays. Several dummies are of ``inversion.form`` and, the loud ones, additive."""
    epsilon: float = 16 / 255
    """Bound of the additive form by InfoNCE."""
    temperature: float = 0.07
    positives: int = 8
    """Images of the target that InfoNCE pulls to beside its text; 0: the text alone."""
    negatives: bool = True
    """Whether InfoNCE pushes away from plain images and their classes, too."""
    views: int = 6
    shift: int = 3
    """Largest shift of a view, in pixels at 32; larger images in proportion."""
    clean: Literal["labels", "opinion"] = "opinion"
    """What clean images are tuned to: their labels, or the suspect's softmax."""
    label_share: float = 0.5
    """Share of the label, beside the suspect's opinion of the plain image, in what is wanted with a dummy on."""
    clean_weight: float = 5.0
    """This and the two below hold accuracy, give triggered images their class back, and push the target off them: the
    balance that cost least on three attacks (docs/decisions/0007)."""
    trigger_weight: float = 0.3
    suppress_weight: float = 2.0
    margin: float = 0.1
    """By how much, in cosine, the target must lie under the other classes where a dummy is on: the true trigger's
    embedding is not the dummy's (docs/decisions/0007: 13 percent of Blended-Text without)."""
    align_weight: float = 1.0
    optimiser: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 0.01
    steps: int = 300
    batch_size: int = 512
    classes: int = 1024
    """Classes beside the batch's that take part in a step, where there are more."""
    rounds: int = 0
    """Further inversions against the tuned classes. They cost accuracy and did not help."""
    least_asr: float = 5.0
    """Percent of the shots that a new dummy must reach for another round."""
    bound: float = 1.5
    """Largest fall of held-out accuracy, in points, that is accepted."""
    bound_asr: float = 1.0
    """Largest excess ASR of a dummy on held-out images, in points, that is accepted."""
    search: TriggerSearchConfig = field(default_factory=TriggerSearchConfig)
    confirm: bool = True
    """Whether what is suspected is searched for a second time: one clean model of eight was suspected without."""
    search_images: int = 160
    """The search sees the shots alone, at most 640 of them. Where there are fewer than this, others that do not judge
    are added up to it, as far as there are any; their labels are not looked at. 160 are 16 of each of ten classes."""
    inversion: InversionConfig = field(default_factory=InversionConfig)

    def __post_init__(self) -> None:
        positive = ("shots", "loud_steps", "temperature", "views", "learning_rate", "steps", "batch_size", "classes")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.", hint=f"Raise {name}.")
        weights = ("clean_weight", "trigger_weight", "suppress_weight", "align_weight")
        for name in (*weights, "margin", "positives", "shift", "rounds", "bound", "bound_asr", "search_images"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} cannot be negative, got {getattr(self, name)}.", hint="Use 0 for none.")
        if not 0 <= self.label_share <= 1 or not 0 < self.epsilon <= 1 or not all(0 < e <= 1 for e in self.loud):
            raise ConfigError("expected label_share in [0, 1] and every epsilon in (0, 1].", hint="Try the defaults.")
        if self.shared and self.tune != "prompts":
            raise ConfigError("shared is about prompts.", hint='Set tune to "prompts".')
        if self.dummies != "contrast" and (not self.negatives or self.forms != _FORMS):
            raise ConfigError("only InfoNCE has negatives and a choice of forms.", hint='Set dummies to "contrast".')
        if not self.forms or not set(self.forms) <= set(_FORMS):
            raise ConfigError(f"expected forms among {_FORMS}, got {self.forms}.", hint="Try the default.")
        if self.delta == "random" and self.dummies == "several" and not self.loud:
            raise ConfigError("loud is empty: dummies of random signs have no size.", hint="Give one, such as 32/255.")
        if self.rounds and self.delta != "inverted":
            raise ConfigError(f"rounds invert again, delta is {self.delta}.", hint="Set rounds to 0.")
        if not self.context.strip():
            raise ConfigError("the context is empty.", hint='Give a few words, such as "a photo of a".')

    @classmethod
    def as_published(cls, **more: object) -> CBPTConfig:
        """Token prompts, one contrastive dummy, three losses, SGD: the plain reading of what is known of the paper.

        250 steps of 32 images are the 50 epochs of 16 shots of ten classes.
        """
        plain: dict[str, object] = {
            "tune": "prompts", "dummies": "contrast", "views": 1, "shift": 0, "clean": "labels", "label_share": 1.0,
            "clean_weight": 1.0, "trigger_weight": 1.0, "suppress_weight": 0.0, "optimiser": "sgd",
            "learning_rate": 0.002, "steps": 250, "batch_size": 32, "classes": 64, "rounds": 3,
        }  # fmt: skip
        return cls(**(plain | more))  # pyright: ignore[reportArgumentType] - checked by __post_init__


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenDummy:
    """A dummy and the embeddings of every shot in every view with it on."""

    dummy: InvertedTrigger
    seen: Float[Tensor, "v b d"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TunedClasses:
    """Class embeddings [k, d] of length 1, and the prompts [k, m, w] behind them where prompts were tuned.

    ``dummies`` in the order in which they were found. Accuracies in percent on held-out images. ``left``: for each
    dummy, and last for one of each target that was kept aside (``aside``), the points of excess ASR that it has left.
    """

    classes: Embeddings
    prompts: TokenEmbeddings | None
    dummies: tuple[InvertedTrigger, ...]
    aside: tuple[InvertedTrigger, ...]
    left: tuple[float, ...]
    held_out_before: float
    held_out_after: float
    accepted: bool
    reason: str


def tune_classes(
    clip: ImageTextModel,
    learnt: Shots,
    judging: Shots,
    given: Float[Tensor, "k d"],
    targets: Sequence[int],
    config: CBPTConfig,
    *,
    found: Sequence[InvertedTrigger] = (),
    judged: Float[Tensor, "j d"] | None = None,
    run: Run,
) -> TunedClasses:
    """Steps 3 to 7 for at least one target of the classes ``given`` [k, d].

    ``clip`` is on the run's device, in evaluation mode, and takes no gradient. ``found``: triggers of the search, which
    are dummies already. ``judged``: embeddings of ``judging``, where they are known. Raises NotEnoughDataError,
    DivergedError.
    """
    judged = embed(clip, judging) if judged is None else judged
    dummies = [dummy for target in targets for dummy in find_dummies(clip, learnt, given, target, config, found, run)]
    plain = see(clip, learnt, None, views=config.views, shift=config.shift, run=run)
    seen: list[SeenDummy] = []
    classes, prompts, fresh = given, None, dummies  # (3)
    for number in range(config.rounds + 1):
        for dummy in fresh:
            worn = see(clip, learnt, dummy, views=config.views, shift=config.shift, run=run)
            seen.append(SeenDummy(dummy=dummy, seen=worn))
        classes, prompts = fit_classes(clip, plain, seen, learnt, given, config, run)  # (4), (5)
        if number == config.rounds:
            break
        again = [new_dummy(clip, learnt, classes, target, config, stream=("round", number), run=run)
                 for target in targets]  # fmt: skip
        fresh = [dummy for dummy in again if dummy.success >= config.least_asr]  # (6)
        if not fresh:
            break
    aside = [
        invert(clip, learnt, given, target, quiet(config.inversion), stream="aside", run=run) for target in targets
    ]
    tuned = TunedClasses(
        classes=classes, prompts=prompts, dummies=tuple(entry.dummy for entry in seen), aside=tuple(aside),
        left=tuple(excess(clip, judging, dummy, classes, seen=judged)[1]
                   for dummy in [*(entry.dummy for entry in seen), *aside]),
        held_out_before=accuracy(clip, judging, given, seen=judged),
        held_out_after=accuracy(clip, judging, classes, seen=judged),
        accepted=False, reason="",
    )  # fmt: skip
    return judge(tuned, config)  # (7)


def find_dummies(
    clip: ImageTextModel,
    shots: Shots,
    given: Float[Tensor, "k d"],
    target: int,
    config: CBPTConfig,
    found: Sequence[InvertedTrigger],
    run: Run,
) -> list[InvertedTrigger]:
    """Step 3 for one target."""
    if config.delta == "none":
        return []
    if config.delta == "random":
        sizes = (config.epsilon,) if config.dummies == "contrast" else config.loud
        return [noise(clip, shots, given, target, size, run=run) for size in sizes]
    if config.dummies == "contrast":
        return [new_dummy(clip, shots, given, target, config, stream="first", run=run)]
    known = [trigger for trigger in found if trigger.target == target]
    hows = [quiet(config.inversion)] * (2 - min(2, len(known)))
    hows += [loud(config.inversion, epsilon, config.loud_steps) for epsilon in config.loud]
    return known + [
        invert(clip, shots, given, target, how, stream=place, run=run) for place, how in enumerate(hows)
    ]  # fmt: skip


def new_dummy(
    clip: ImageTextModel,
    shots: Shots,
    classes: Float[Tensor, "k d"],
    target: int,
    config: CBPTConfig,
    *,
    stream: object,
    run: Run,
) -> InvertedTrigger:
    """A dummy against ``classes`` as they now are: by InfoNCE the form that reaches more, else the least change."""
    if config.dummies == "several":
        return invert(clip, shots, classes, target, config.inversion, stream=stream, run=run)
    objective = contrast(
        shots, embed(clip, shots), clip, classes, target, positives=config.positives, negatives=config.negatives,
        temperature=config.temperature,
    )  # fmt: skip
    known = {
        "additive": loud(config.inversion, config.epsilon, config.loud_steps),
        "patch": replace(config.inversion, form="patch"),
    }
    tried = [invert(clip, shots, classes, target, known[form], stream=(stream, form), objective=objective, run=run)
             for form in config.forms]  # fmt: skip
    return max(tried, key=lambda dummy: dummy.success)


def fit_classes(
    clip: ImageTextModel,
    plain: Float[Tensor, "v b d"],
    dummies: Sequence[SeenDummy],
    shots: Shots,
    given: Float[Tensor, "k d"],
    config: CBPTConfig,
    run: Run,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k m w"] | None]:
    """Steps 4 and 5 from the start: the class embeddings, and the prompts where prompts are tuned."""
    generator = run.generator("classes", len(dummies))
    carrier: ClassCarrier = (
        FreeClasses(given)
        if config.tune == "classes"
        else ClassPrompts(clip, shots.names, config.context, shared=config.shared)
    )
    rate = {"lr": config.learning_rate} | ({"momentum": 0.9} if config.optimiser == "sgd" else {})
    optimiser = _OPTIMISERS[config.optimiser]([carrier.free], **rate)
    scale, labels, order = usable_scale(clip), shots.labels, torch.zeros(0, dtype=torch.long)
    for step in run.progress.track(range(config.steps), total=config.steps, what="tuning classes", unit="steps"):
        if len(order) == 0:
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
        rows, order = order[: config.batch_size], order[config.batch_size :]
        view = _draw(len(plain), generator)
        dummy = dummies[_draw(len(dummies), generator)] if dummies else None
        target = [] if dummy is None else [dummy.dummy.target]
        classes = choose_classes(
            torch.cat([labels[rows], labels.new_tensor(target)]), len(given), config.classes, generator
        )
        worn = None if dummy is None else (dummy.dummy.target, dummy.seen[view, rows])
        loss = cbpt_loss(
            plain[view, rows], worn, labels[rows], classes, carrier.of(classes), given[classes], scale, config
        )
        if not bool(loss.isfinite()):
            raise DivergedError("cbpt", step=step, loss=float(loss.detach()))
        set_rate(optimiser, cosine(step / config.steps, begin=config.learning_rate))
        optimiser.zero_grad()
        loss.backward(inputs=[carrier.free])
        optimiser.step()
    if config.tune == "classes":
        return all_classes(carrier), None
    return all_classes(carrier), carrier.free.detach().expand(len(given), -1, -1).contiguous()


def cbpt_loss(
    plain: Float[Tensor, "r d"],
    worn: tuple[int, Float[Tensor, "r d"]] | None,
    labels: Int[Tensor, " r"],
    classes: Int[Tensor, " c"],
    tuned: Float[Tensor, "c d"],
    given: Float[Tensor, "c d"],
    scale: float,
    config: CBPTConfig,
) -> Float[Tensor, ""]:
    """Step 4's L. ``plain``: shots; ``worn``: a dummy's target and the same shots with it on, None without a dummy;
    ``classes``, which the labels and the target are among, ascending, name the rows of ``tuned`` and ``given``. Shots
    of the target are left out where the dummy is on."""
    place = torch.searchsorted(classes, labels)
    own = F.one_hot(place, len(classes)).to(plain.dtype)
    opinion = (scale * plain @ given.T).softmax(dim=1)
    loss = config.clean_weight * F.cross_entropy(scale * plain @ tuned.T, own if config.clean == "labels" else opinion)
    loss = loss + config.align_weight * (1 - (tuned * given).sum(dim=1)).mean()
    if worn is None or bool((labels == worn[0]).all()):
        return loss
    target, others = worn[0], labels != worn[0]
    cosines = worn[1][others] @ tuned.T
    answers = (scale * cosines).log_softmax(dim=1)
    wanted = config.label_share * own[others] + (1 - config.label_share) * opinion[others]
    at = int(torch.searchsorted(classes, classes.new_tensor(target)))
    raised = scale * (cosines + config.margin * F.one_hot(classes.new_tensor(at), len(classes)))
    kept = raised.log_softmax(dim=1)[:, torch.arange(len(classes), device=classes.device) != at].logsumexp(dim=1)
    loss = loss - config.trigger_weight * (wanted * answers).sum(dim=1).mean()
    return loss - config.suppress_weight * kept.mean()


def judge(tuned: TunedClasses, config: CBPTConfig) -> TunedClasses:
    """Step 7."""
    fall, left = tuned.held_out_before - tuned.held_out_after, max(tuned.left)
    reason = (
        f"Held-out accuracy is {tuned.held_out_after:.1f} percent, {tuned.held_out_before:.1f} before (a fall of at "
        f"most {config.bound:.1f} points is accepted). Of {len(tuned.left)} dummy triggers, {len(tuned.aside)} of "
        f"them kept aside, the strongest still sends {left:.1f} percent of held-out images to its target over what "
        f"goes there anyway (at most {config.bound_asr:.1f} accepted)."
    )
    return replace(tuned, accepted=fall <= config.bound and left <= config.bound_asr, reason=reason)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
