"""Train the tiny CLIP that ships with unpoison, on CPUs, in under an hour.

    torchrun --nproc-per-node 2 recipes/tiny_clip.py train --shared ../shared --images 560000
    python recipes/tiny_clip.py export --shared ../shared

It knows the shapes world and, as far as 25,000 pictures teach them, CIFAR-10's classes. Sources: the shapes world;
rows 0..24,999 of CIFAR-10 train (never the rows that are poisoned in tests and benchmarks); Tiny-ImageNet; Flickr8k.
One process per core, one thread each, is 1.6 times faster here than one process with two threads.
`train` goes on where it was stopped. `export` writes the folder that `CLIPModel.from_pretrained` loads, and its card.
"""

import argparse
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from muon import Muon
from PIL import Image
from tiny_clip_model import build_model, build_tokenizer
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from unpoison.data.shapes import SHAPES_CLASSES, make_shapes

SIZE = 32
CIFAR_ROWS = 25_000
MIX = {"cifar10": 0.58, "shapes": 0.18, "tiny_imagenet": 0.18, "flickr8k": 0.06}
TEMPLATES = (
    "a photo of a {}.",
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a photo of the {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a picture of a {}.",
    "{}",
)
SHAPES_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}")
ASSET = Path(__file__).parents[1] / "src/unpoison/assets/tiny_clip"


@dataclass
class Corpus:
    """Pictures uint8 [n, s, s, 3], for each a list of captions, and a concept: equal concepts are no negatives."""

    pictures: np.ndarray
    captions: list[list[str]]
    concepts: np.ndarray
    upright: bool


def square(data: bytes, size: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = size / min(image.size)
    image = image.resize(
        (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_corpora(shared: Path, cache: Path, seed: int) -> dict[str, Corpus]:
    def pictures(name: str, file: Path, rows: int | None) -> tuple[np.ndarray, dict]:
        table = pq.read_table(file)
        table = table if rows is None else table.slice(0, rows)
        stored = cache / f"{name}.npy"
        if not stored.exists():
            array = np.stack([square(row["bytes"], SIZE) for row in table["image"].to_pylist()])
            np.save(stored.with_suffix(".partial.npy"), array)
            stored.with_suffix(".partial.npy").rename(stored)
        return np.load(stored), {name: table[name].to_pylist() for name in table.column_names if name != "image"}

    def class_names(file: Path) -> list[str]:
        meta = json.loads(pq.read_schema(file).metadata[b"huggingface"])
        return [name.replace("_", " ") for name in meta["info"]["features"]["label"]["names"]]

    data = shared / "data"
    corpora = {}
    for name, rows in (("cifar10", CIFAR_ROWS), ("tiny_imagenet", None)):
        file = data / name / "train.parquet"
        array, columns = pictures(name, file, rows)
        names = class_names(file)
        labels = np.array(columns["label"])
        captions = [[template.format(names[label]) for template in TEMPLATES] for label in labels]
        corpora[name] = Corpus(array, captions, labels, upright=False)
    array, columns = pictures("flickr8k", data / "flickr8k/train.parquet", None)
    corpora["flickr8k"] = Corpus(array, columns["captions"], np.arange(len(array)), upright=False)
    world = make_shapes(60_000, size=SIZE, seed=seed + 1_000)
    captions = [
        [caption, *(template.format(SHAPES_CLASSES[label]) for template in SHAPES_TEMPLATES)]
        for caption, label in zip(world.captions, world.labels, strict=True)
    ]
    corpora["shapes"] = Corpus(world.images, captions, np.asarray(world.labels), upright=True)
    return corpora


def augment(pictures: np.ndarray, upright: bool, generator: torch.Generator) -> Tensor:
    """uint8 [b, s, s, 3] to [b, 3, s, s] in [0, 1]: zoom, shift, and for photos turn, flip, light and color."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255)
    b = len(x)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(b, *shape, generator=generator) * (high - low) + low

    zoom = draw(0.85, 1.05) if upright else draw(0.7, 1.1)
    turn = draw(0, 0) if upright else draw(-0.2, 0.2)
    flip = torch.ones(b) if upright else torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = zoom * turn.cos() * flip
    theta[:, 0, 1] = -zoom * turn.sin()
    theta[:, 1, 0] = zoom * turn.sin() * flip
    theta[:, 1, 1] = zoom * turn.cos()
    theta[:, :, 2] = draw(-0.15, 0.15, 2) if upright else draw(-0.22, 0.22, 2)
    grid = F.affine_grid(theta, [b, 3, SIZE, SIZE], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if not upright:
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * draw(0.75, 1.25, 1, 1, 1) + mean + draw(-0.1, 0.1, 1, 1, 1) + draw(-0.04, 0.04, 3, 1, 1)
    return x.clamp_(0, 1)


class ContrastiveLoss(nn.Module):
    """Symmetric InfoNCE whose targets are shared by all pairs of one concept; a share of the patches is left out.

    Sources with classes also teach the image tower through a linear layer of their own, thrown away afterwards: two
    towers that both start at random hardly move for the first hundreds of steps without it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: CLIPModel, keep: float, classes: dict[str, int] | None = None) -> None:
        super().__init__()
        self.model = model
        self.keep = keep
        width = model.visual_projection.out_features
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in (classes or {}).items()})
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1))

    def embed_images(self, images: Tensor, keep: float) -> Tensor:
        tower = self.model.vision_model
        tokens = tower.embeddings((images - self.mean) / self.std)
        if keep < 1:
            b, n = tokens.shape[0], tokens.shape[1] - 1
            kept = torch.rand(b, n).argsort(1)[:, : round(n * keep)] + 1
            kept = torch.cat([torch.zeros(b, 1, dtype=torch.long), kept], 1)
            tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens)).last_hidden_state
        return self.model.visual_projection(tower.post_layernorm(hidden[:, 0]))

    def forward(
        self, name: str, images: Tensor, tokens: dict[str, Tensor], concepts: Tensor, text_of: Tensor, same: Tensor
    ) -> Tensor:
        """``tokens``: u distinct captions; ``text_of`` [b]: caption of each image; ``same`` [b, u]: equal concept."""
        raw = self.embed_images(images, self.keep if self.training else 1.0)
        image = F.normalize(raw, dim=-1)
        text = embed_texts(self.model, tokens)
        logits = self.model.logit_scale.clamp(max=4.6052).exp() * image @ text.T
        own = F.one_hot(text_of, text.shape[0]).float()
        target = 0.1 * own + 0.9 * same / same.sum(1, keepdim=True)
        to_text = -(target * logits.log_softmax(1)).sum(1).mean()
        reverse = same / same.sum(0, keepdim=True)
        to_image = -(reverse * logits.log_softmax(0)).sum(0).mean()
        loss = 0.5 * (to_text + to_image)
        if name in self.heads:
            loss = loss + F.cross_entropy(self.heads[name](raw), concepts, label_smoothing=0.1)
        return loss


def embed_texts(model: CLIPModel, tokens: Mapping[str, Tensor]) -> Tensor:
    output = model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
    assert isinstance(output, BaseModelOutputWithPooling)  # noqa: S101 # the configuration's default
    assert output.pooler_output is not None  # noqa: S101
    return F.normalize(output.pooler_output, dim=-1)


def make_batch(corpus: Corpus, rows: np.ndarray, tokenizer: CLIPTokenizer, generator: torch.Generator) -> tuple:
    picks = torch.randint(0, 1_000_000, (len(rows),), generator=generator).tolist()
    captions = [corpus.captions[row][pick % len(corpus.captions[row])] for row, pick in zip(rows, picks, strict=True)]
    texts = sorted(set(captions))
    index = {text: i for i, text in enumerate(texts)}
    text_of = torch.tensor([index[caption] for caption in captions])
    concepts = torch.from_numpy(corpus.concepts[rows])
    caption_concept = torch.empty(len(texts), dtype=torch.long)
    caption_concept[text_of] = concepts
    # Two pictures of different concepts may have one caption, which then belongs to both.
    own = F.one_hot(text_of, len(texts)).bool()
    same = (own | (concepts[:, None] == caption_concept[None])).float()
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    images = augment(corpus.pictures[rows], corpus.upright, generator)
    return (
        images,
        {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]},
        concepts,
        text_of,
        same,
    )


def optimisers(loss: ContrastiveLoss, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    model = loss.model
    matrices = [
        weight
        for tower in (model.vision_model.encoder, model.text_model.encoder)
        for weight in tower.parameters()
        if weight.ndim == 2
    ]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in loss.parameters() if id(weight) not in chosen]
    return [Muon(matrices, muon_lr), torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98), weight_decay=0.05)]


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(
        cpu=args.cpu, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    main, work = accelerator.is_main_process, args.work
    work.mkdir(parents=True, exist_ok=True)
    if main:
        read_corpora(args.shared, work, args.seed)
    accelerator.wait_for_everyone()
    corpora = read_corpora(args.shared, work, args.seed)
    if main and not (work / "tokenizer").exists():
        build_tokenizer(
            sorted({c for corpus in corpora.values() for row in corpus.captions for c in row})
        ).save_pretrained(work / "tokenizer")
    accelerator.wait_for_everyone()
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    torch.manual_seed(args.seed)
    classes = {name: int(corpus.concepts.max()) + 1 for name, corpus in corpora.items() if name != "flickr8k"}
    loss_module = ContrastiveLoss(build_model(tokenizer), args.keep, classes)
    opts = optimisers(loss_module, args.muon_lr, args.adam_lr)
    base = [group["lr"] for opt in opts for group in opt.param_groups]
    steps = args.images // (args.batch * accelerator.num_processes)
    state_file, step = work / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        loss_module.load_state_dict(state["model"])
        for opt, stored in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(stored)
        step = state["step"]
    loss_of = accelerator.prepare(loss_module)
    names, shares = list(MIX), np.array(list(MIX.values()))
    begun, first = time.time(), step
    while step < steps:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step * 101 + accelerator.process_index)
        name = np.random.default_rng([args.seed, step]).choice(names, p=shares)
        corpus = corpora[name]
        rows = torch.randint(0, len(corpus.pictures), (args.batch,), generator=generator).numpy()
        factor = min(1.0, (step + 1) / args.warmup) * (1 - step / steps)
        for group, lr in zip((g for opt in opts for g in opt.param_groups), base, strict=True):
            group["lr"] = lr * factor
        loss = loss_of(name, *make_batch(corpus, rows, tokenizer, generator))
        for opt in opts:
            opt.zero_grad()
        accelerator.backward(loss)
        for opt in opts:
            opt.step()
        step += 1
        if main and (step % 20 == 0 or step == steps):
            rate = (step - first) * args.batch * accelerator.num_processes / (time.time() - begun)
            print(f"step {step}/{steps} {name} loss {loss.item():.3f} {rate:.0f} images/s", flush=True)
        if main and (step % 200 == 0 or step == steps):
            state = {"model": loss_module.state_dict(), "optimisers": [opt.state_dict() for opt in opts], "step": step}
            torch.save(state, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").rename(state_file)
    accelerator.end_training()


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: np.ndarray, labels, names) -> float:
    loss = ContrastiveLoss(model, 1.0).eval()
    tokens = tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
    texts = embed_texts(model, tokens)
    hits = 0
    for start in range(0, len(pictures), 500):
        x = torch.from_numpy(pictures[start : start + 500]).permute(0, 3, 1, 2).float() / 255
        hits += int(((loss.embed_images(x, 1.0) @ texts.T).argmax(1).numpy() == labels[start : start + 500]).sum())
    return 100 * hits / len(pictures)


def export(args: argparse.Namespace) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    model = build_model(tokenizer)
    state = torch.load(args.work / "state.pt", weights_only=True)
    prefix = "model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)})
    model = model.half().float().eval()
    world = make_shapes(5_000, size=SIZE, seed=7)
    table = pq.read_table(args.shared / "data/cifar10/test.parquet")
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    pictures = np.stack([square(row["bytes"], SIZE) for row in table["image"].to_pylist()])
    figures = {
        "zero_shot_shapes": zero_shot_accuracy(
            model, tokenizer, world.images, np.asarray(world.labels), SHAPES_CLASSES
        ),
        "zero_shot_cifar10": zero_shot_accuracy(model, tokenizer, pictures, np.array(table["label"]), names),
        "n_shapes": 5_000,
        "n_cifar10": len(pictures),
        "seed": args.seed,
        "steps": state["step"],
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "template": "a photo of a {}.",
    }
    if not args.dry_run:
        model.half().save_pretrained(ASSET, safe_serialization=True)
        tokenizer.save_pretrained(ASSET)
        CLIPImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_convert_rgb=True
        ).save_pretrained(ASSET)
        results = Path(__file__).parents[1] / "benchmarks/results/tiny_clip.json"
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train", "export"])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_clip"))
    parser.add_argument("--images", type=int, default=560_000)
    parser.add_argument("--batch", type=int, default=160, help="pictures a step and process")
    parser.add_argument("--keep", type=float, default=0.75, help="share of patches seen in training")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="export: measure only")
    args = parser.parse_args()
    (train if args.verb == "train" else export)(args)


if __name__ == "__main__":
    main()
