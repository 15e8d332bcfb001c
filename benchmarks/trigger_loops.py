"""Each trigger once more, for one image at a time, in NumPy and PIL: what the batches are measured against.

Whole arrays of an image are computed at once wherever NumPy can, so that the loop over images is what is compared;
only the dithering goes pixel by pixel, as its definition does. An image is [h, w, 3] in [0, 1], float32 or float64, as
it comes from a PIL image; so is what comes back. The random parts (patterns, places, fields) are given: the formulas
are what is written down again. The tests hold the batches against these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Array = np.ndarray


def stamped(image: Array, patch: Array, top: int, left: int) -> Array:
    """A patch [s, s, 3] pasted by PIL, which cuts off what does not fit. BadNet and its kin; values of 8 bits."""
    canvas = Image.fromarray(np.rint(image * 255).astype(np.uint8))
    canvas.paste(Image.fromarray(np.rint(patch * 255).astype(np.uint8)), (left, top))
    return np.asarray(canvas, dtype=np.float32) / 255


def blended(image: Array, pattern: Array, alpha: float | Array) -> Array:
    """(1 - alpha) x + alpha n, clipped."""
    return np.clip((1 - alpha) * image + alpha * pattern, 0, 1)


def added(image: Array, pattern: Array) -> Array:
    """x + n, clipped."""
    return np.clip(image + pattern, 0, 1)


def grid_patch(side: int) -> Array:
    """White dots at even rows and columns, drawn one by one."""
    canvas = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(canvas)
    for row in range(0, side, 2):
        for column in range(0, side, 2):
            draw.point((column, row), fill=(255, 255, 255))
    return np.asarray(canvas, dtype=np.float32) / 255


def triangles(image: Array, side: int, alpha: float) -> Array:
    """Tiles of 0.4 on and below the diagonal and 0.8 above it."""
    height, width = image.shape[:2]
    tile = np.where(np.tri(side, dtype=bool), np.float32(0.4), np.float32(0.8))
    pattern = np.tile(tile, (-(-height // side), -(-width // side)))[:height, :width, None]
    return blended(image, pattern, alpha)


def sinusoid(image: Array, delta: float, f: float) -> Array:
    width = image.shape[1]
    wave = [delta / 255 * math.sin(2 * math.pi * f * column / width) for column in range(width)]
    return added(image, np.array(wave, image.dtype)[:, None])


def warped(image: Array, field: Array, s: float) -> Array:
    """Each pixel read where the field [h, w, 2] says, between its four neighbours; two pixels a side at least."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    x = np.clip(2 * columns / (width - 1) - 1 + s * field[..., 0] / width, -1, 1)
    y = np.clip(2 * rows / (height - 1) - 1 + s * field[..., 1] / height, -1, 1)
    across, down = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
    left = np.minimum(across.astype(np.int64), width - 2)
    top = np.minimum(down.astype(np.int64), height - 2)
    right, below = (across - left)[..., None], (down - top)[..., None]
    upper = (1 - right) * image[top, left] + right * image[top, left + 1]
    lower = (1 - right) * image[top + 1, left] + right * image[top + 1, left + 1]
    return (1 - below) * upper + below * lower


def dithered(image: Array, levels: int) -> Array:
    """Floyd and Steinberg's raster loop; errors are spread in the image's own type."""
    height, width = image.shape[:2]
    values = image * np.asarray(levels - 1, image.dtype)
    shares = np.array([7 / 16, 3 / 16, 5 / 16, 1 / 16], image.dtype)
    for row in range(height):
        for column in range(width):
            old = values[row, column].copy()
            new = np.rint(old)
            error = old - new
            values[row, column] = new
            if column + 1 < width:
                values[row, column + 1] += error * shares[0]
            if row + 1 < height:
                if column > 0:
                    values[row + 1, column - 1] += error * shares[1]
                values[row + 1, column] += error * shares[2]
                if column + 1 < width:
                    values[row + 1, column + 1] += error * shares[3]
    return np.clip(values, 0, levels - 1) / (levels - 1)


def chrominance_raised(image: Array, magnitude: float, places: Sequence[int] = (15, 31), block: int = 32) -> Array:
    """To YUV, each block of U and V to the DCT domain (SciPy), the coefficients raised, and all the way back."""
    from scipy.fft import dctn, idctn

    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % block), (0, -width % block), (0, 0)), mode="edge").astype(np.float64)
    red, green, blue = np.moveaxis(padded, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    planes = [0.492 * (blue - luma), 0.877 * (red - luma)]
    for plane in planes:
        for top in range(0, plane.shape[0], block):
            for left in range(0, plane.shape[1], block):
                square = np.asarray(dctn(plane[top : top + block, left : left + block], norm="ortho"))
                for place in places:
                    square[place, place] += magnitude / 255
                plane[top : top + block, left : left + block] = np.asarray(idctn(square, norm="ortho"))
    u, v = planes
    back = np.stack([luma + 1.140 * v, luma - 0.395 * u - 0.581 * v, luma + 2.032 * u], axis=-1)
    return np.clip(back[:height, :width], 0, 1)


def low_frequencies(image: Array, weights: Array, delta: float) -> Array:
    """The sum of cosines with ``weights`` [3, k, k], one by one, scaled to ``delta``, added and clipped."""
    height, width = image.shape[:2]
    pattern = np.zeros((height, width, 3))
    for channel, u, v in np.ndindex(*weights.shape):
        down = np.cos(math.pi * u * (np.arange(height) + 0.5) / height) * (math.sqrt(0.5) if u == 0 else 1)
        across = np.cos(math.pi * v * (np.arange(width) + 0.5) / width) * (math.sqrt(0.5) if v == 0 else 1)
        pattern[:, :, channel] += weights[channel, u, v] * np.outer(down, across)
    return added(image, delta / 255 * pattern / max(np.abs(pattern).max(), 1e-12))


def nashville(image: Array) -> Array:
    """The filter color by color, each step as the CSS specification has it."""
    x = 0.44 * image + 0.56 * np.minimum(image, np.array((247, 176, 153), image.dtype) / 255)
    x = 0.6 * x + 0.4 * np.maximum(x, np.array((0, 70, 150), image.dtype) / 255)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    sepia = [
        (0.393 + 0.607 * 0.8) * r + (0.769 - 0.769 * 0.8) * g + (0.189 - 0.189 * 0.8) * b,
        (0.349 - 0.349 * 0.8) * r + (0.686 + 0.314 * 0.8) * g + (0.168 - 0.168 * 0.8) * b,
        (0.272 - 0.272 * 0.8) * r + (0.534 - 0.534 * 0.8) * g + (0.131 + 0.869 * 0.8) * b,
    ]
    r, g, b = (np.clip(1.05 * np.clip(1.2 * np.clip(c, 0, 1) - 0.1, 0, 1), 0, 1) for c in sepia)
    saturated = [
        (0.213 + 0.787 * 1.2) * r + (0.715 - 0.715 * 1.2) * g + (0.072 - 0.072 * 1.2) * b,
        (0.213 - 0.213 * 1.2) * r + (0.715 + 0.285 * 1.2) * g + (0.072 - 0.072 * 1.2) * b,
        (0.213 - 0.213 * 1.2) * r + (0.715 - 0.715 * 1.2) * g + (0.072 + 0.928 * 1.2) * b,
    ]
    return np.clip(np.stack(saturated, axis=-1), 0, 1)


def corner_checkers(image: Array, side: int, amplitude: float) -> Array:
    """BadNet's checker added at the bottom right and mirrored into the other corners; the image has room for all."""
    height, width = image.shape[:2]
    result = image.copy()
    bright = {(0, 2), (1, 1), (2, 0), (2, 2)}
    for row in range(side):
        for column in range(side):
            sign = 1 if (row * 3 // side, column * 3 // side) in bright else -1
            down, across = height - side + row, width - side + column
            for place in {(down, across), (height - 1 - down, across), (down, width - 1 - across),
                          (height - 1 - down, width - 1 - across)}:  # fmt: skip
                result[place] += sign * amplitude
    return np.clip(result, 0, 1)


def some_pieces(image: Array, pattern: Array, shown: Array, alpha: float) -> Array:
    """The pieces of the pattern where ``shown`` [n, n] is set, mixed in; the rest of the image stays."""
    height, width = image.shape[:2]
    mask = shown[np.arange(height) * len(shown) // height][:, np.arange(width) * len(shown) // width]
    return np.where(mask[..., None], (1 - alpha) * image + alpha * pattern, image)


def corner_patches(image: Array, patches: Sequence[Array], alphas: Sequence[float]) -> Array:
    """Patches mixed into the corners (top left, top right, bottom left, bottom right), opacity 0 for none."""
    height, width = image.shape[:2]
    result = image.copy()
    for corner, (patch, alpha) in enumerate(zip(patches, alphas, strict=True)):
        side = len(patch)
        top, left = (height - side) * (corner // 2), (width - side) * (corner % 2)
        square = result[top : top + side, left : left + side]
        result[top : top + side, left : left + side] = (1 - alpha) * square + alpha * patch
    return result
