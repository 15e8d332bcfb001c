"""Forward and backward passes of attention on one CPU thread: torch's fused kernel beside the plain form.

    python benchmarks/attention.py

Why :func:`unpoison.models.clip_transformers.fast_precision` takes the plain form where gradients are computed in half
precision. Milliseconds of processor time, the least of five; written to benchmarks/results/attention.json.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from unpoison.results import write_atomically

RESULT = Path(__file__).parents[1] / "benchmarks/results/attention.json"
SHAPES = {  # batch, heads, tokens, channels of a head
    "tiny CLIP, image": (128, 3, 17, 64),
    "tiny CLIP, text": (128, 3, 32, 64),
    "ViT-B/32, image": (32, 12, 50, 64),
    "ViT-B/32, text": (32, 8, 77, 64),
    "ViT-B/16, image": (16, 12, 197, 64),
    "ViT-L/14, image": (8, 16, 257, 64),
}
KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}


def milliseconds(shape: tuple[int, ...], dtype: torch.dtype, kernel: SDPBackend) -> float:
    queries, keys, values = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    times = []
    for _ in range(5):
        begun = time.process_time()
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(queries, keys, values).sum().backward()
        times.append(time.process_time() - begun)
    return 1000 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"torch": torch.__version__, "milliseconds": {}}
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            row = {kernel: round(milliseconds(shape, dtype, how), 1) for kernel, how in KERNELS.items()}
            found["milliseconds"][f"{name}, {str(dtype).removeprefix('torch.')}"] = row
            print(f"{name:18} {dtype}  {row}", flush=True)
    write_atomically(RESULT, json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
