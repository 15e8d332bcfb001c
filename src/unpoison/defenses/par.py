"""PAR: clean a backdoored CLIP by pushing its embeddings away from where they were while it stays a CLIP.

Paper
    Singh, Croce, Hein. "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP." CVPR 2026,
    arXiv 2412.00727.
Idea
    A backdoor lives in the particular embeddings that poisoned training ended in. Move both towers far from their own
    past (perturb) while a contrastive loss on clean pairs keeps images and captions matched (recover). The push ends
    by itself once the embeddings are far enough; what follows is ordinary training.
Needs
    The suspicious CLIP and clean or synthetic image-caption pairs. Neither trigger, target nor poisoned data.
Protects
    Both towers' weights; with ``text_tower = "frozen"`` the image tower's alone.
Steps
    1. Two copies: the suspect (phi_P, psi_P), frozen, and (phi, psi), all of whose weights are trained. Embeddings
       have length 1.
    2. Both see the same augmented image and the same caption. With probability 1/2 noise that only brightens: a sample
       of N(0, 0.2) cut to [0, 1], added, the sum cut again. With probability 1/2 one square of 0.5 to 1 % of the area
       erased to 0 after normalisation.
    3. L_CLIP: symmetric InfoNCE over the global batch, at the suspect's temperature, which is not trained.
    4. S_img = mean ||phi(x) - phi_P(x)||^2 and S_txt likewise; gate(S) = S where S <= tau, else 0, tower by tower.
    5. Minimise L_CLIP - 1/2 [gate(S_img) + gate(S_txt)], tau = 2.15.
    6. AdamW, betas (0.9, 0.98), weight decay 1e-4 but none on biases and norms; the rate falls linearly from 3e-5 to a
       tenth of it over the first half, then along a cosine to 1e-9. BatchNorm keeps its statistics. No early stop.
Where we differ, and what the paper leaves open
    Pairs are held out and looked at on the way. A run whose loss leaves the finite numbers, or that forgets the pairs
    altogether, stops and keeps its last good weights. Pixels are resized once, to the model's size; a caption is drawn
    anew each time where an image has several. The suspect's text embeddings are computed once, since captions are
    used as they are. Gradients are averaged over processes for both towers, and large batches may be embedded in chunks
    with the same gradient (:func:`unpoison.contrastive.cached_gradients`). :meth:`PARConfig.scaled` sets rate, batch
    and steps for models and sets smaller than the paper's.
    Ours, off in :class:`PARConfig`, most of it on in :meth:`PARConfig.recommended`: ``search_concepts`` looks for a
    trigger first (:mod:`unpoison.detection.clip_triggers`), and a model that shows none is handed back as it came;
    ``adversary_share`` puts a universal adversary (:mod:`unpoison.defenses.universal`) on some of the images after step
    2, and what it finds is what the embeddings are pushed away from; with ``adversary_start`` it begins as what the
    suspect itself is weakest at, an inverted trigger, and the one that the search found is carried as often, as it is;
    ``text_tower = "frozen"`` keeps the texts where they are, so that a rotation of both towers, which costs L_CLIP
    nothing, is no way out; ``distill = "relations"`` adds the cross-entropy to the suspect's softmax over the batch's
    captions on the plain image; ``recovery = "latched"`` never opens the gate again once it was shut for a whole
    interval between looks; ``crop`` and ``flip`` augment further.
    tau = 2.15 means a mean cosine under -0.075 with the old embeddings: indexes, heads and connectors built on those no
    longer fit. The looks report the cosines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unpoison.clip_loop import train_steps
from unpoison.clip_training import (
    ClipRepair,
    Look,
    PairTrainingConfig,
    Suspect,
    choose_weights,
    frozen_copy,
    open_training,
    trainable,
)
from unpoison.contrastive import (
    average_gradients,
    cached_gradients,
    gather_with_gradient,
    info_nce,
    lower_scale,
    optimiser_step,
)
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels
from unpoison.data.training_pairs import process_slice
from unpoison.data.transforms import brighten, crop_at, erase_square
from unpoison.defenses.universal import ADDED, FOUND, PASTED, WRITTEN, Places, Universal, draw_places
from unpoison.detection.clip_triggers import FEWEST_CONCEPTS
from unpoison.detection.inversion import InvertedTrigger
from unpoison.errors import ConfigError
from unpoison.runs import Run
from unpoison.schedules import decay_groups, linear_then_cosine, set_rate
from unpoison.types import Embeddings, Images, ImageTextModel, Tower

_NOISE_ROWS = 64  # rows of a batch that share one stream of noise: any chunk of the batch can draw its own


@dataclass(frozen=True, kw_only=True)
class PARConfig(PairTrainingConfig):
    """PAR's constants as published, for 250,000 pairs and models of about 100 M parameters."""

    batch_size: int = 2048
    learning_rate: float = 3e-5
    middle_rate: float = 0.1
    """Rate in the middle of the run, as a share of the first."""
    final_rate: float = 1e-9
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    tau: float = 2.15
    """Squared distance at which a tower's gate shuts; the knob between clean accuracy and ASR."""
    noise: float = 0.2
    """Standard deviation of the brightening noise, before it is cut to [0, 1]."""
    noise_share: float = 0.5
    erase_share: float = 0.5
    erase_area: tuple[float, float] = (0.005, 0.01)
    """Least and largest share of the area that is erased."""
    text_tower: Literal["train", "frozen"] = "train"
    """Ours: ``frozen`` trains and perturbs the image tower alone."""
    distill: Literal["none", "relations"] = "none"
    """Ours: ``relations`` keeps the suspect's opinion of plain images over the batch's captions."""
    distill_weight: float = 1.0
    recovery: Literal["gate", "latched"] = "gate"
    """Ours: ``latched`` keeps the gate shut once it was shut in every step between two looks."""
    crop: int = 0
    """Ours: random shifts of up to so many pixels."""
    flip: bool = False
    """Ours: half the images mirrored."""
    adversary_share: float = 0.0
    """Ours: share of the images that carry a universal adversary, half of them as a pattern, half as a patch."""
    adversary_epsilon: float = 16 / 255
    """Largest change of a pixel by the adversary's pattern."""
    adversary_patch: float = 0.2
    """Side of the adversary's patch as a share of the image's."""
    adversary_values: float = 0.0
    """Share of an image's values that the adversary writes over; 0 for no such adversary."""
    adversary_step: float = 2 / 255
    """How far the adversary's pattern moves in a step; patch and values move four times as far."""
    search_concepts: int = 0
    """Ours: look for a trigger among so many concepts of the captions first, and leave a model alone that shows none;
    0 looks for none. Read by ``purify_with_par``."""
    adversary_start: float = 0.0
    """Share of the steps, under 1, at the beginning in which all images carry the adversary, which moves, and the model
    stands still: it starts from what the suspect is weakest at. Without an adversary there is no such beginning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 4:
            raise ConfigError(f"tau must lie in (0, 4], got {self.tau}.", hint="Unit vectors are at most 4 apart.")
        low, high = self.erase_area
        if not 0 < low <= high < 1:
            raise ConfigError(f"erase_area must be two shares in (0, 1), got {self.erase_area}.", hint="Least first.")
        for name in ("noise_share", "erase_share", "adversary_share", "adversary_epsilon", "adversary_patch",
                     "adversary_values"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}.", hint="Try 0.5.")
        if not 0 <= self.adversary_start < 1:
            raise ConfigError(
                f"adversary_start must lie in [0, 1), got {self.adversary_start}.", hint="The model trains in the rest."
            )
        if self.search_concepts != 0 and self.search_concepts < FEWEST_CONCEPTS:
            raise ConfigError(
                f"search_concepts must be 0 or at least {FEWEST_CONCEPTS}, got {self.search_concepts}.",
                hint="A concept is suspected by comparison with others; 0 looks for no trigger.",
            )
        if self.noise < 0 or self.crop < 0 or self.distill_weight < 0:
            raise ConfigError("noise, crop and distill_weight cannot be negative.", hint="Use 0 to switch one off.")

    @property
    def trains(self) -> tuple[Tower, ...]:
        return ("image", "text") if self.text_tower == "train" else ("image",)

    @classmethod
    def recommended(cls, *, parameters: int, samples: int, **more: object) -> PARConfig:
        """Ours: PAR with what "ours" below adds to it, at twice the scaled rate, and a push that ends early.

        A universal adversary does the forgetting, so that the embeddings need not move far: tau 0.5. Chosen on victims
        of the tiny CLIP that no table has (benchmarks/par.py, ``--set tune``).
        """
        start = cls.scaled(parameters=parameters, samples=samples)
        return cls.scaled(
            parameters=parameters,
            samples=samples,
            **({"learning_rate": RECOMMENDED_FACTOR * start.learning_rate} | RECOMMENDED | more),
        )


RECOMMENDED: dict[str, object] = {
    "tau": 0.5,
    "text_tower": "frozen",
    "distill": "relations",
    "crop": 2,
    "flip": True,
    "adversary_share": 0.1,
    "adversary_values": 0.05,
    "adversary_start": 0.1,
    "search_concepts": 12,
}
RECOMMENDED_FACTOR = 2.0


def repair_with_par(
    clip: ImageTextModel, pairs: ImageTextPairs, config: PARConfig, *, run: Run, found: InvertedTrigger | None = None,
    pixels: Pixels | None = None,
) -> ClipRepair:  # fmt: skip
    """Steps 1 to 6 on a copy of ``clip``; the adversary, if there is one, carries the trigger that was ``found``, too.

    Raises NotEnoughDataError, SourceFormatError, ModelError.
    """
    data = open_training(clip, pairs, config, run=run, pixels=pixels)
    suspect = frozen_copy(clip, run)  # (1)
    old = Suspect(clip=suspect, data=data, run=run, plain=config.distill == "relations")
    mine = process_slice(data.batch_size, run)
    with trainable(clip, run) as trained:
        towers = [named for tower in config.trains for named in trained.tower(tower)]
        weights = choose_weights(trained, towers)
        groups = decay_groups(towers, config.weight_decay)
        side = max(1, round(config.adversary_patch * clip.image_size))
        adversary = Universal.draw(
            clip.image_size, side, config.adversary_epsilon, config.adversary_values,
            run.generator("adversary"), run.device, found,
        )  # fmt: skip
        kinds = [ADDED, PASTED, *([WRITTEN] if config.adversary_values else [])]
        share = config.adversary_share
        if found is not None:  # on as many images more as each of the others has
            kinds, share = [*kinds, FOUND], min(1.0, share * (1 + 1 / len(kinds)))
        waiting = min(round(config.adversary_start * data.steps), data.steps - 1) if config.adversary_share else 0
        optimiser = torch.optim.AdamW(groups, config.learning_rate, betas=config.betas, eps=config.epsilon)

        def one_step(step: int, looks: list[Look]) -> dict[str, Tensor]:
            batch = data.batch(step, run)
            views = draw_views(len(batch), clip.image_size, config, run.generator("views", step))
            old.begin(batch)
            tau = 0.0 if config.recovery == "latched" and was_shut(looks) else config.tau
            figures: dict[str, Tensor] = {}
            carrying = share if step >= waiting else 1.0
            places = draw_places(
                len(batch), clip.image_size, side, carrying, run.generator("places", step), kinds=kinds
            )
            carriers: list[tuple[Tensor, Tensor, Places]] = []

            def embed(start: int, stop: int) -> list[Tensor]:
                rows = slice(mine.start + start, mine.start + stop)
                plain = data.images(batch.rows[rows]).to(run.device)
                noise = draw_noise(rows, clip.image_size, step, run) if config.noise_share else None
                images = augment(plain, views.of(rows), noise, clip.image_mean, config)  # (2)
                without = images
                if config.adversary_share:
                    images = adversary.apply(images, places.of(rows))
                old.see(start, images, plain)
                if config.adversary_share and weights[0].requires_grad:  # not in a pass without a graph
                    carriers.append((images.requires_grad_(), without, places.of(rows)))
                with run.accelerator.autocast():
                    embedded = [trained.encode_images(images)]
                    if config.text_tower == "train":
                        embedded.append(data.encode(trained, batch.captions[rows]))
                return embedded

            def loss(images: Tensor, texts: Tensor | None = None) -> Tensor:
                images = gather_with_gradient(images, run.accelerator)
                texts = None if texts is None else gather_with_gradient(texts, run.accelerator)
                value, terms = par_loss(images, texts, old.images(), old.texts(), clip.logit_scale, tau)  # (3) to (5)
                if config.distill == "relations":
                    matched = old.texts() if texts is None else texts
                    relations = relation_loss(images, matched, old.plain_images(), old.texts(), clip.logit_scale)
                    terms["relation_loss"] = relations.detach()
                    value = value + config.distill_weight * relations
                figures.update(terms)
                return value

            set_rate(optimiser, par_rate(max(0, step - waiting), data.steps - waiting, config))  # (6)
            optimiser.zero_grad()
            total = cached_gradients(
                embed, loss, size=mine.stop - mine.start, chunk=config.chunk_size, module=trained.module,
                accelerator=run.accelerator,
            )  # fmt: skip
            moved = not config.adversary_share or adversary.ascend(carriers, config.adversary_step, run.accelerator)
            stepped = True
            if step >= waiting:
                average_gradients(weights, run.accelerator)
                stepped = optimiser_step(optimiser, run.accelerator)
            if stepped and not moved:  # a step that was skipped has lowered the scale
                lower_scale(run.accelerator)
            return figures | {"loss": total}

        return train_steps(
            trained, suspect, optimiser, one_step, data, config, name="par", run=run, extra=adversary.tensors()
        )


def par_loss(
    images: Embeddings,
    texts: Embeddings | None,
    old_images: Embeddings,
    old_texts: Embeddings,
    logit_scale: float,
    tau: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Steps 3 to 5 on unit embeddings [b, d] of one global batch, and the terms by name without a graph.

    ``texts`` None: the text tower is frozen, its embeddings are the suspect's and have no gate. tau = 0: gates shut.
    """
    value = info_nce(images, old_texts if texts is None else texts, logit_scale)
    terms = {"contrastive_loss": value.detach()}
    distances = {"image": squared_distance(images, old_images)}
    if texts is not None:
        distances["text"] = squared_distance(texts, old_texts)
    for name, distance in distances.items():
        value = value - gate(distance, tau) / 2
        terms |= {f"{name}_distance": distance.detach(), f"{name}_open": (distance.detach() <= tau).float()}
    return value, terms


def squared_distance(new: Embeddings, old: Embeddings) -> Float[Tensor, ""]:
    """S = mean ||new - old||^2 of matching unit rows: 2 - 2 mean cos."""
    return (new - old).square().sum(dim=1).mean()


def gate(distance: Float[Tensor, ""], tau: float) -> Float[Tensor, ""]:
    """S where S <= tau, else 0, with no gradient there."""
    return torch.where(distance <= tau, distance, torch.zeros_like(distance))


def was_shut(looks: list[Look]) -> bool:
    """Whether between any two looks no step found a gate open."""
    return any(
        all(value == 0 for key, value in look.items() if key.endswith("_open"))
        for look in looks
        if "image_open" in look
    )


def relation_loss(
    images: Embeddings, texts: Embeddings, old_images: Embeddings, old_texts: Embeddings, logit_scale: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy of softmax(s x T) to the suspect's softmax(s x_P T_P), over the batch's captions."""
    teacher = (logit_scale * old_images @ old_texts.T).softmax(dim=1)
    return F.cross_entropy(logit_scale * images @ texts.T, teacher)


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """What was drawn for each image of a global batch: noise or none, the erased square (side 0: none), shift, flip."""

    noisy: Bool[Tensor, " b"]
    top: Int[Tensor, " b"]
    left: Int[Tensor, " b"]
    side: Int[Tensor, " b"]
    shift: Int[Tensor, "2 b"]
    flipped: Bool[Tensor, " b"]

    def of(self, rows: slice) -> Views:
        return Views(
            noisy=self.noisy[rows],
            top=self.top[rows],
            left=self.left[rows],
            side=self.side[rows],
            shift=self.shift[:, rows],
            flipped=self.flipped[rows],
        )


def draw_views(count: int, size: int, config: PARConfig, generator: torch.Generator) -> Views:
    """Step 2's choices for ``count`` images of ``size`` pixels; the square lies anywhere inside the image."""
    chance = torch.rand(6, count, generator=generator)
    low, high = config.erase_area
    side = (size * (low + (high - low) * chance[0]).sqrt()).round().long().clamp(1, size)
    return Views(
        noisy=chance[1] < config.noise_share,
        side=torch.where(chance[2] < config.erase_share, side, 0),
        top=(chance[3] * (size - side + 1)).long(),
        left=(chance[4] * (size - side + 1)).long(),
        shift=torch.randint(2 * config.crop + 1, (2, count), generator=generator),
        flipped=(chance[5] < 0.5) & config.flip,
    )


def draw_noise(rows: slice, size: int, step: int, run: Run) -> Float[Tensor, "b 3 h w"]:
    """Standard normal noise for these rows of a step's batch: the same whichever chunk or process draws it."""
    blocks = range(rows.start // _NOISE_ROWS, -(-rows.stop // _NOISE_ROWS))
    parts = []
    for block in blocks:
        generator = torch.Generator(run.device).manual_seed(run.seed_of("noise", step, block))
        parts.append(torch.randn(_NOISE_ROWS, 3, size, size, generator=generator, device=run.device))
    begin = rows.start - blocks.start * _NOISE_ROWS
    return torch.cat(parts)[begin : begin + rows.stop - rows.start]


def augment(
    images: Images,
    views: Views,
    noise: Float[Tensor, "b 3 h w"] | None,
    fill: tuple[float, float, float],
    config: PARConfig,
) -> Images:
    """Step 2 on images in [0, 1]; ``fill`` is the colour that becomes 0 when it is normalised."""
    if config.flip:
        images = torch.where(views.flipped.to(images.device)[:, None, None, None], images.flip(-1), images)
    if config.crop:
        images = crop_at(images, views.shift[0], views.shift[1], config.crop)
    if noise is not None:
        images = brighten(images, config.noise * noise, views.noisy)
    return erase_square(images, views.top, views.left, views.side, fill)


def par_rate(step: int, total: int, config: PARConfig) -> float:
    """Step 6's learning rate at a step of ``total``."""
    middle = config.middle_rate * config.learning_rate
    return linear_then_cosine(step, total=total, peak=config.learning_rate, middle=middle, end=config.final_rate)
