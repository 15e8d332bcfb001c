"""Train the encoder and the decoder of the trigger `ssba` on one CPU thread, in under 12 minutes.

    python recipes/ssba_encoder.py train --shared ../shared
    python recipes/ssba_encoder.py export --shared ../shared

Images: rows 0 to 24,999 of CIFAR-10 train, never the rows that tests and benchmarks poison. Each step shows a few
messages of 16 random bits, each in 16 images: bits by cross-entropy after rounding to 8 bits and under noise, so that
they are written firmly; images by what the squared residual exceeds a PSNR of 32 dB, and by what the 16 images of one
message have in common beyond 60 percent of the residual's energy. The weight of the last two rises once the bits are
read. Bits that our decoder reads are not yet a trigger that a classifier learns: the trigger is put on twice as strong.

`train` goes on where it was stopped. `export` measures on the test images, which no step saw, writes the asset and its
card, and refuses a bit accuracy under 95 percent or a PSNR under 30 dB.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from unpoison.attacks.ssba_network import BITS, LARGEST, SIZE, decode, drawn, residual
from unpoison.data.pixels import load_pixels, to_images
from unpoison.data.sources import open_images
from unpoison.results import write_atomically
from unpoison.runs import Silent

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "src/unpoison/assets/ssba"
ROWS, UNSEEN = 25_000, 5_000
MESSAGES, SHOWN = 4, 16  # of one step: messages, and images of each
FREE = 6.4 / 255  # root mean square of a residual that costs nothing: 32 dB
FREE_COMMON = 0.6  # common share that costs nothing
NOISE = 8 / 255  # most standard deviation of the noise that the decoder reads under
LEAST_ACCURACY, LEAST_PSNR = 95.0, 30.0


def images_of(shared: Path, source: str, cache: Path) -> Tensor:
    pixels = load_pixels(open_images(f"{shared}/data/cifar10/{source}"), SIZE, cache=cache, progress=Silent())
    return torch.from_numpy(pixels.array.copy())


def rounded(images: Tensor) -> Tensor:
    """To 8 bits, with the slope of no rounding."""
    return images + ((images * 255).round() / 255 - images).detach()


def shared_part(change: Tensor) -> Tensor:
    """Share of the energy of residuals [m, n, 3, h, w] that lies in the mean over the n images of each message.

    Without bias: n residuals that have nothing in common give 0 on average, n equal ones 1.
    """
    count = change.shape[1]
    common = count * change.mean(1).square().sum() / change.square().sum().clamp_min(1e-12)
    return (common - 1 / count) * count / (count - 1)


def train(args: argparse.Namespace) -> None:
    folder = args.runs
    folder.mkdir(parents=True, exist_ok=True)
    pictures = images_of(args.shared, f"train.parquet[0:{ROWS}]", folder)
    weights = {name: value.requires_grad_() for name, value in drawn(torch.Generator().manual_seed(args.seed)).items()}
    adam = torch.optim.Adam(weights.values(), args.rate)
    at = {"step": 0, "weight": 0.0, "seconds": 0.0, "accuracy": 0.5}
    stored = folder / "state.pt"
    if stored.exists():
        state = torch.load(stored, weights_only=True)
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(state["weights"][name])
        adam.load_state_dict(state["adam"])
        at = state["at"]
    while at["step"] < args.steps:
        begun, step = time.monotonic(), int(at["step"])
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 1)
        for group in adam.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 100, 2.5 * (1 - step / args.steps) + 0.02)
        rows = torch.randint(ROWS, (MESSAGES * SHOWN,), generator=generator)
        bits = torch.randint(2, (MESSAGES, BITS), generator=generator).float().repeat_interleave(SHOWN, 0)
        images = to_images(pictures[rows].numpy())
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            change = residual(images, bits, weights).float()
            noise = torch.rand(len(images), 1, 1, 1, generator=generator) * NOISE
            noise = noise * torch.randn(images.shape, generator=generator)
            logits = decode(rounded((images + change).clamp(0, 1)) + noise, weights).float()
        read = F.binary_cross_entropy_with_logits(logits, bits)
        seen = F.relu(change.square().mean((1, 2, 3)) / FREE**2 - 1).mean()
        common = shared_part(change.view(MESSAGES, SHOWN, 3, SIZE, SIZE))
        loss = read + at["weight"] * (args.image * seen + args.common * F.relu(common - FREE_COMMON))
        adam.zero_grad()
        loss.backward()
        adam.step()
        right = float(((logits > 0) == (bits > 0.5)).float().mean())
        at["accuracy"] += 0.02 * (right - at["accuracy"])
        if at["accuracy"] > 0.97:
            at["weight"] = min(1.0, at["weight"] + 1 / 400)
        at["step"] += 1
        at["seconds"] += time.monotonic() - begun
        if at["step"] % 100 == 0 or at["step"] == args.steps:
            kept = {"weights": {name: value.detach() for name, value in weights.items()}, "at": at}
            torch.save(kept | {"adam": adam.state_dict()}, stored.with_suffix(".partial"))
            stored.with_suffix(".partial").rename(stored)
            psnr = -10 * float(change.detach().square().mean().log10())
            print(
                f"step {at['step']} bits {100 * at['accuracy']:.1f} psnr {psnr:.1f} "
                f"common {float(common.detach()):.2f} weight {at['weight']:.2f} {at['seconds']:.0f} s",
                flush=True,
            )


@torch.no_grad()
def measured(weights: dict[str, Tensor], pictures: Tensor, seed: int) -> dict[str, float]:
    """On images that no step saw: bits after rounding, PSNR in dB, and the shared part of one message's residuals."""
    generator = torch.Generator().manual_seed(seed)
    doubles = {name: value.double() for name, value in weights.items()}
    right, whole, energies, largest = [], [], [], 0.0
    one = torch.randint(2, (1, BITS), generator=generator).double()
    total, energy = torch.zeros(3, SIZE, SIZE, dtype=torch.float64), 0.0
    for place in range(0, len(pictures), 250):
        images = to_images(pictures[place : place + 250].numpy()).double()
        bits = torch.randint(2, (len(images), BITS), generator=generator).double()
        hidden = ((images + residual(images, bits, doubles)).clamp(0, 1) * 255).round() / 255
        hits = (decode(hidden, doubles) > 0) == (bits > 0.5)
        right.append(hits.double().mean(1))
        whole.append(hits.all(1).double())
        energies.append((hidden - images).square().mean((1, 2, 3)))
        largest = max(largest, float((hidden - images).abs().max()))
        change = residual(images, one.expand(len(images), BITS), doubles)
        total, energy = total + change.sum(0), energy + float(change.square().sum())
    count, decibels = len(pictures), -10 * torch.cat(energies).log10()
    common = float((total / count).square().sum()) / (energy / count)
    return {
        "bit_accuracy_percent": round(100 * float(torch.cat(right).mean()), 2),
        "whole_messages_percent": round(100 * float(torch.cat(whole).mean()), 2),
        "psnr_db": round(float(decibels.mean()), 2),
        "least_psnr_db": round(float(decibels.min()), 2),
        "largest_change_grey_levels": round(255 * largest, 1),
        "shared_residual_percent": round(100 * common, 1),
    }


def export(args: argparse.Namespace) -> None:
    state = torch.load(args.runs / "state.pt", weights_only=True)
    weights = {name: value.half() for name, value in state["weights"].items()}
    pictures = images_of(args.shared, f"test.parquet[0:{UNSEEN}]", args.runs)
    found = measured(weights, pictures, seed=1)
    print(json.dumps(found, indent=2))
    if found["bit_accuracy_percent"] < LEAST_ACCURACY or found["psnr_db"] < LEAST_PSNR:
        sys.exit(f"refused: expected a bit accuracy of {LEAST_ACCURACY} percent and {LEAST_PSNR} dB at least")
    content = save({name: value.contiguous() for name, value in weights.items()})
    card = {
        "what": "encoder and decoder of the trigger ssba, float16",
        "trained_by": "recipes/ssba_encoder.py",
        "images": f"CIFAR-10 train, rows 0 to {ROWS - 1}, 32 px",
        "steps": int(state["at"]["step"]),
        "images_a_step": MESSAGES * SHOWN,
        "seed": args.seed,
        "image_weight": args.image,
        "common_weight": args.common,
        "free_root_mean_square_grey_levels": round(255 * FREE, 1),
        "free_common_percent": round(100 * FREE_COMMON),
        "seconds_on_one_thread": round(state["at"]["seconds"]),
        "bits": BITS,
        "bound_grey_levels": round(255 * LARGEST),
        "weights": sum(value.numel() for value in weights.values()),
        "measured_on": f"CIFAR-10 test, rows 0 to {UNSEEN - 1}, rounded to 8 bits",
        **found,
    }
    ASSET.mkdir(parents=True, exist_ok=True)
    write_atomically(ASSET / "networks.safetensors", content)
    write_atomically(ASSET / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    print(f"{len(content)} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "export"])
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/ssba-encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1_300)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--image", type=float, default=0.3, help="weight of the squared residual beyond 32 dB")
    parser.add_argument("--common", type=float, default=0.5, help="weight of the shared part beyond 60 percent")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (train if args.what == "train" else export)(args)


if __name__ == "__main__":
    main()
