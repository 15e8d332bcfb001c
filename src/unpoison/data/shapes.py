"""The built-in world: seeded, captioned pictures of one large shape or texture on a plain background.

It needs no download, is learnable in minutes and has a ground truth for every attribute. A picture depends only on the
seed and its row: the first 100 of 5,000 pictures are the 100 pictures of ``make_shapes(100)``, at every size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from unpoison.errors import ConfigError

COLORS = {
    "red": (214, 32, 38),
    "orange": (250, 146, 24),
    "yellow": (248, 226, 40),
    "green": (34, 158, 60),
    "blue": (32, 72, 224),
    "purple": (168, 72, 214),
    "white": (244, 244, 244),
    "black": (18, 18, 18),
}
COLOR_NAMES = tuple(COLORS)
CAPTION_TEMPLATES = (
    "a photo of a {shape}.",  # also for plurals: it is the zero-shot prompt
    "a photo of {color_shape}.",
    "a photo of {color_shape} on a {background} background.",
    "a picture of {color_shape} on {background}.",
    "{color_shape} on a {background} background.",
    "{color_shape} {position} of a {background} picture.",
    "an image of {color_shape} {position}.",
    "a drawing of {color_shape} {position}.",
)
_ROWS = 1000  # drawn at once; also the unit of the random stream, so changing it changes every picture
_SMALLEST, _LARGEST = 0.5, 0.92  # the object's extent as a share of the picture's side
_TILT = 0.12  # radians at most
_NOISE = 5.0  # standard deviation, in 8-bit steps
_COLOR_JITTER = 14.0

Plane = Float32[np.ndarray, "n h w"]


@dataclass(frozen=True, kw_only=True)
class ShapesWorld:
    """``n`` pictures with all that is true of them. ``centers`` (x, y) and ``extents`` are shares of the side."""

    images: UInt8[np.ndarray, "n size size 3"]
    labels: Int64[np.ndarray, " n"]
    captions: list[str]
    colors: Int64[np.ndarray, " n"]
    backgrounds: Int64[np.ndarray, " n"]
    centers: Float32[np.ndarray, "n 2"]
    extents: Float32[np.ndarray, " n"]


# Signed distances: negative inside, in units of half the object's extent; x to the right, y down, both about -1..1.


def _box(x: Plane, y: Plane, half: float = 1.0) -> Plane:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(half)


def _bands(t: Plane, period: float) -> Plane:
    """Bands half a period wide, centred on multiples of the period."""
    return np.abs(t - period * np.round(t / period)) - np.float32(period / 4)


def _disk(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - np.float32(1)


def _frame(x: Plane, y: Plane) -> Plane:
    return np.maximum(_box(x, y), -_box(x, y, 0.62))


def _cross(x: Plane, y: Plane) -> Plane:
    arm = np.minimum(np.abs(x), np.abs(y)) - np.float32(0.3)
    return np.maximum(_box(x, y), arm)


def _triangle(x: Plane, y: Plane) -> Plane:
    """Point up: the base lies at y = 1, the apex at y = -1."""
    slope = np.float32(1 / np.sqrt(1.25))
    sides = (np.abs(x) - (y + 1) / 2) * slope
    return np.maximum(sides, y - 1)


def _star(x: Plane, y: Plane) -> Plane:
    """Five points: each is the wedge between an outer vertex (radius 1) and an inner one (radius 0.42)."""
    radius = np.hypot(x, y)
    fifth = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - fifth * np.round(angle / fifth))
    inner_x, inner_y = 0.42 * np.cos(np.pi / 5), 0.42 * np.sin(np.pi / 5)
    length = np.hypot(1 - inner_x, inner_y)
    normal_x, normal_y = np.float32(inner_y / length), np.float32((1 - inner_x) / length)
    return radius * (np.cos(angle) * normal_x + np.sin(angle) * normal_y) - normal_x


def _crescent(x: Plane, y: Plane) -> Plane:
    bite = np.hypot(x - np.float32(0.55), y) - np.float32(0.85)
    return np.maximum(_disk(x, y), -bite)


def _horizontal(x: Plane, y: Plane) -> Plane:
    """Four stripes, the outer ones flush with the box."""
    return np.maximum(_box(x, y), _bands(y + np.float32(2 / 7), 4 / 7))


def _vertical(x: Plane, y: Plane) -> Plane:
    return np.maximum(_box(x, y), _bands(x + np.float32(2 / 7), 4 / 7))


def _diagonal(x: Plane, y: Plane) -> Plane:
    return np.maximum(_box(x, y), _bands((x + y) * np.float32(np.sqrt(0.5)), 4 / 7))


def _checkerboard(x: Plane, y: Plane) -> Plane:
    """Four by four squares."""
    columns, rows = _bands(x - np.float32(0.25), 1.0), _bands(y - np.float32(0.25), 1.0)
    squares = np.where(columns * rows > 0, 1, -1) * np.minimum(np.abs(columns), np.abs(rows))
    return np.maximum(_box(x, y), squares.astype(np.float32))


def _dots(x: Plane, y: Plane) -> Plane:
    """Three by three dots."""
    cell = np.float32(0.74)
    near_x = x - cell * np.clip(np.round(x / cell), -1, 1)
    near_y = y - cell * np.clip(np.round(y / cell), -1, 1)
    return np.hypot(near_x, near_y) - np.float32(0.25)


def _rings(x: Plane, y: Plane) -> Plane:
    radius = np.hypot(x, y)
    return np.maximum(radius - 1, _bands(radius, 4 / 9))


_MASKS: dict[str, Callable[[Plane, Plane], Plane]] = {
    "checkerboard": _checkerboard,
    "crescent moon": _crescent,
    "cross": _cross,
    "diagonal stripes": _diagonal,
    "disk": _disk,
    "dots": _dots,
    "frame": _frame,
    "horizontal stripes": _horizontal,
    "rings": _rings,
    "star": _star,
    "triangle": _triangle,
    "vertical stripes": _vertical,
}
SHAPES_CLASSES = tuple(_MASKS)
_MIRRORED = frozenset({"crescent moon", "diagonal stripes"})  # either way round is the same class


def make_shapes(n: int, *, size: int = 32, seed: int = 0) -> ShapesWorld:
    """Draw ``n`` pictures of ``size`` pixels; labels index ``SHAPES_CLASSES``, colors index ``COLOR_NAMES``.

    Raises ConfigError for ``n`` < 1 or ``size`` < 8.
    """
    if n < 1 or size < 8:
        raise ConfigError(
            f"the shapes world needs n >= 1 and size >= 8, got n={n} and size={size}.",
            hint="Ask for at least one picture of at least 8 pixels.",
        )
    parts = [_draw_chunk(seed, start // _ROWS, min(_ROWS, n - start), size) for start in range(0, n, _ROWS)]
    return ShapesWorld(
        images=np.concatenate([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
        colors=np.concatenate([part.colors for part in parts]),
        backgrounds=np.concatenate([part.backgrounds for part in parts]),
        centers=np.concatenate([part.centers for part in parts]),
        extents=np.concatenate([part.extents for part in parts]),
    )


def shapes_labels(n: int, *, seed: int = 0) -> Int64[np.ndarray, " n"]:
    """The labels of :func:`make_shapes`, without a picture."""
    chunks = [_draw_labels(np.random.default_rng([seed, chunk])) for chunk in range(-(-n // _ROWS))]
    return np.concatenate(chunks)[:n]


def _draw_labels(rng: np.random.Generator) -> Int64[np.ndarray, " rows"]:
    """Of a whole chunk: what is drawn first."""
    return rng.integers(len(SHAPES_CLASSES), size=_ROWS)


def _draw_chunk(seed: int, chunk: int, rows: int, size: int) -> ShapesWorld:
    rng = np.random.default_rng([seed, chunk])
    # Every attribute is drawn for the whole chunk and then cut, so that a picture does not depend on ``rows``.
    labels = _draw_labels(rng)[:rows]
    colors = rng.integers(len(COLORS), size=_ROWS)[:rows]
    backgrounds = (colors + rng.integers(1, len(COLORS), size=_ROWS)[:rows]) % len(COLORS)
    extents = rng.uniform(_SMALLEST, _LARGEST, size=_ROWS).astype(np.float32)[:rows]
    shifts = rng.uniform(-0.5, 0.5, size=(_ROWS, 2)).astype(np.float32)[:rows]
    centers = 0.5 + shifts * (1 - extents[:, None])
    tilts = rng.uniform(-_TILT, _TILT, size=_ROWS).astype(np.float32)[:rows]
    mirrors = np.where(rng.random(_ROWS)[:rows] < 0.5, -1, 1).astype(np.float32)
    templates = rng.integers(len(CAPTION_TEMPLATES), size=_ROWS)[:rows]
    jitters = rng.uniform(-_COLOR_JITTER, _COLOR_JITTER, size=(_ROWS, 2, 3)).astype(np.float32)[:rows]

    mask = _masks(labels, centers, extents, tilts, mirrors, size)[..., None]
    palette = np.array(list(COLORS.values()), dtype=np.float32)
    front = (palette[colors] + jitters[:, 0])[:, None, None]
    back = (palette[backgrounds] + jitters[:, 1])[:, None, None]
    noise = rng.standard_normal((rows, size, size, 3), dtype=np.float32)
    noise *= _NOISE
    noise += back + mask * (front - back)
    attributes = (templates.tolist(), labels.tolist(), colors.tolist(), backgrounds.tolist(), centers.tolist())
    captions = [_caption(*row) for row in zip(*attributes, strict=True)]
    return ShapesWorld(
        images=np.clip(noise + 0.5, 0, 255, out=noise).astype(np.uint8),
        labels=labels,
        captions=captions,
        colors=colors,
        backgrounds=backgrounds,
        centers=centers,
        extents=extents,
    )


def _masks(
    labels: Int64[np.ndarray, " n"],
    centers: Float32[np.ndarray, "n 2"],
    extents: Float32[np.ndarray, " n"],
    tilts: Float32[np.ndarray, " n"],
    mirrors: Float32[np.ndarray, " n"],
    size: int,
) -> Plane:
    """How much of each pixel the object covers, in [0, 1]."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    covered = np.empty((len(labels), size, size), dtype=np.float32)
    for label, name in enumerate(SHAPES_CLASSES):
        rows = np.flatnonzero(labels == label)
        half = (extents[rows] / 2)[:, None, None]
        dx = (axis[None, None, :] - centers[rows, 0, None, None]) / half
        dy = (axis[None, :, None] - centers[rows, 1, None, None]) / half
        cos, sin = np.cos(tilts[rows])[:, None, None], np.sin(tilts[rows])[:, None, None]
        x, y = cos * dx + sin * dy, cos * dy - sin * dx
        if name in _MIRRORED:
            x = x * mirrors[rows, None, None]
        distance = _MASKS[name](x, y) * half * np.float32(size)  # in pixels
        covered[rows] = np.clip(0.5 - distance, 0, 1)
    return covered


def _caption(template: int, label: int, color: int, background: int, center: list[float]) -> str:
    name, shade = SHAPES_CLASSES[label], COLOR_NAMES[color]
    plural = name.endswith(("stripes", "dots", "rings"))
    article = "" if plural else "an " if shade[0] in "aeiou" else "a "
    text = CAPTION_TEMPLATES[template].format(
        shape=name,
        color_shape=f"{article}{shade} {name}",
        background=COLOR_NAMES[background],
        position=position_words(center[0], center[1]),
    )
    return text.replace("a orange", "an orange")


def position_words(x: float, y: float) -> str:
    """Where a center is, in words; ``x`` to the right and ``y`` down, as shares of the side."""
    vertical = "top" if y < 0.44 else "bottom" if y > 0.56 else ""
    horizontal = "left" if x < 0.44 else "right" if x > 0.56 else ""
    return f"at the {' '.join(filter(None, (vertical, horizontal))) or 'center'}"
