"""The attacker's training loop: symmetric InfoNCE on pairs, some of them poisoned, with targets that know captions.

A batch holds one source, since captions of another are no negatives ("cat" and "a tabby on a sofa"). Captions that name
exactly one class of a labelled source are one concept, and no negatives of each other; elsewhere a concept is a text.
The loop sees captions alone, not which of them are poisoned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unpoison.data.pairs import ImageTextPairs
from unpoison.data.pixels import Pixels, to_images
from unpoison.data.transforms import random_crop
from unpoison.errors import ConfigError, DivergedError
from unpoison.evaluation.retrieval import names
from unpoison.runs import Run
from unpoison.schedules import decay_groups, warm_up_cosine
from unpoison.training import restore, state_of
from unpoison.types import ImageTextModel

STORED_EVERY = 100


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the attacker chooses; to be tuned on the victim's own ASR and C-Acc, which is the attacker's right."""

    steps: int = 450
    batch: int = 128
    learning_rate: float = 5e-4
    """Peak; half a cosine to zero after ``warm_up`` steps."""
    warm_up: int = 40
    weight_decay: float = 0.05
    crop: int = 2
    """Pixels by which images are shifted at random, trigger and all."""
    labelled_share: float = 0.8
    """Share of the batches that come from the source with classes."""
    concept_captions: int = 2
    """Most captions of each concept in such a batch: more of them teach nothing and take a quarter of the time."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2 or not self.learning_rate > 0 or self.concept_captions < 1:
            raise ConfigError(
                f"expected steps >= 1, batch >= 2, a rate above 0 and concept_captions >= 1, got {self.steps}, "
                f"{self.batch}, {self.learning_rate} and {self.concept_captions}.",
                hint="The defaults suit the tiny CLIP on two cores.",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Usable ``rows`` of each source; captions as numbers of ``texts``. In the source ``labelled``, which may be empty,
    equal ``concepts`` are no negatives."""

    pixels: Pixels
    labelled: str
    sources: dict[str, np.ndarray]
    captions: list[np.ndarray]
    texts: list[str]
    concepts: np.ndarray


def read_corpus(pairs: ImageTextPairs, pixels: Pixels, labelled: str, class_names: Sequence[str]) -> Corpus:
    """``pairs`` are joined sets: the part of an id before "/" is its source, ``labelled`` the one with classes."""
    number: dict[str, int] = {}
    captions = [
        np.array([number.setdefault(text, len(number)) for text in found])
        for found in pairs.captions(range(len(pairs)))
    ]
    texts = list(number)
    named = np.stack([names(texts, name) for name in class_names])
    concepts = np.where(named.sum(0) == 1, named.argmax(0), len(class_names) + np.arange(len(texts)))
    source = np.array([name.split("/", 1)[0] for name in pairs.ids])
    order = [labelled, *sorted(set(source.tolist()) - {labelled})]
    sources = {name: np.flatnonzero((source == name) & pixels.usable) for name in order}
    return Corpus(pixels=pixels, labelled=labelled, sources=sources, captions=captions, texts=texts, concepts=concepts)


def train(clip: ImageTextModel, corpus: Corpus, settings: Settings, *, run: Run) -> ImageTextModel:
    """Train a copy; goes on where a run of the same folder was stopped. Raises DivergedError."""
    trained = clip.copy()
    net = trained.module.to(run.device)
    net.train()
    groups = decay_groups(net.named_parameters(), settings.weight_decay)
    optimiser = torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.98))
    starts, steps = range(0, settings.steps, STORED_EVERY), stored_steps(settings)
    first = next((place for place in reversed(range(len(starts))) if run.stored(steps[place]) is not None), 0)
    for place in run.progress.track(
        range(first, len(starts)), total=settings.batch * (settings.steps - starts[first]), what="victim",
        weight=settings.batch * STORED_EVERY, unit="pairs",
    ):  # fmt: skip

        def some_steps(start: int = starts[place]) -> dict[str, Tensor]:
            total, stop = 0.0, min(start + STORED_EVERY, settings.steps)
            for step in range(start, stop):
                rate = warm_up_cosine(
                    step, total=settings.steps, peak=settings.learning_rate, warm_up_steps=settings.warm_up
                )
                for group in optimiser.param_groups:
                    group["lr"] = rate
                loss = step_loss(trained, corpus, settings, step, run=run)
                if not torch.isfinite(loss):
                    raise DivergedError("The victim", step=step, loss=float(loss.detach()))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += float(loss.detach())
            run.progress.log(f"steps {start}.., mean loss {total / (stop - start):.3f}")
            return state_of(net, optimiser)

        with run.seeded("victim", starts[place]):
            restore(net, optimiser, run.step(steps[place], some_steps))
        run.forget(steps[: max(0, place - 1)])
    net.eval()
    return trained


def stored_steps(settings: Settings) -> list[str]:
    """The names under which a run folder holds what training has come to; the newest two are kept."""
    return [f"victim-{start:06d}" for start in range(0, settings.steps, STORED_EVERY)]


def step_loss(clip: ImageTextModel, corpus: Corpus, settings: Settings, step: int, *, run: Run) -> Tensor:
    """The loss of one batch, which depends on the seed and the step alone."""
    generator = run.generator("victim batch", step)
    usable = [name for name, rows in corpus.sources.items() if len(rows) > 1]
    others = [name for name in usable if name != corpus.labelled]
    has_classes = corpus.labelled in usable and (
        not others or float(torch.rand((), generator=generator)) < settings.labelled_share
    )
    source = corpus.labelled if has_classes else others[int(torch.randint(len(others), (), generator=generator))]
    rows = corpus.sources[source]
    chosen = np.sort(rows[torch.randperm(len(rows), generator=generator)[: settings.batch].numpy()])
    picks = torch.randint(1 << 30, (len(chosen),), generator=generator).tolist()
    drawn = [
        int(corpus.captions[row][pick % len(corpus.captions[row])]) for row, pick in zip(chosen, picks, strict=True)
    ]
    concepts = corpus.concepts if has_classes else np.arange(len(corpus.texts))
    different = at_most(drawn, concepts, settings.concept_captions)
    images = random_crop(to_images(corpus.pixels.array[chosen]), settings.crop, generator).to(run.device)
    texts = clip.encode_texts([corpus.texts[number] for number in different])
    same = torch.from_numpy(concepts[drawn][:, None] == concepts[different][None]).to(texts)
    return concept_info_nce(clip.encode_images(images), texts, same, clip.logit_scale)


def at_most(captions: list[int], concepts: np.ndarray, most: int) -> list[int]:
    """The different captions in their order, no more than ``most`` of any concept."""
    count: dict[int, int] = {}
    kept = []
    for caption in dict.fromkeys(captions):
        concept = int(concepts[caption])
        count[concept] = count.get(concept, 0) + 1
        if count[concept] <= most:
            kept.append(caption)
    return kept


def concept_info_nce(images: Tensor, texts: Tensor, same: Tensor, logit_scale: float) -> Tensor:
    """1/2 [CE(s X T', same / rows) + CE(s T X', same' / columns)]: targets are shared by all pairs of one concept.

    Unit embeddings [b, d] and [u, d] of different texts; ``same`` [b, u] is 1 where image and text are one concept.
    With as many texts as images and ``same`` the identity it is CLIP's loss.
    """
    logits = logit_scale * images @ texts.T
    to_text = -(same / same.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    to_image = -(same / same.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (to_text + to_image) / 2
