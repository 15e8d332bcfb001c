"""From the bytes of a stranger's image file to 8-bit RGB pixels, or to the reason why not."""

from __future__ import annotations

import io
import threading
import warnings
from types import TracebackType

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 64_000_000
"""Images with more pixels are not decoded: a few kilobytes of file can claim to hold gigabytes of picture."""

# Formats that are pictures and nothing else: no vector graphics, nothing that starts another program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
_REASON_LENGTH = 160


class UndecodableImage(Exception):
    """The bytes are no picture that we read; ``reason`` is one sentence without markup or addresses."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _QuietPillow:
    """Silences Pillow's warnings about odd metadata while any thread decodes.

    The list of warning filters belongs to the whole process, so the first thread in installs the filter and the last
    one out removes it; Pillow's warnings alone are affected.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._filters.__exit__(kind, error, trace)


quiet_pillow = _QuietPillow()
"""Hold this around a loop of ``decode_image`` calls; each call also takes it by itself."""


def decode_image(data: bytes) -> Image.Image:
    """The first frame of an encoded image as 8-bit RGB, upright, transparent parts over white.

    16-bit grey is scaled to 8 bits, CMYK and palettes are converted, the EXIF orientation is applied.
    Raises UndecodableImage for bytes that are empty, truncated, damaged, of another format, of zero size, or that
    claim more than ``MAX_PIXELS``.
    """
    if not data:
        raise UndecodableImage("the image is empty (0 bytes)")
    with quiet_pillow:
        try:
            return _decode(data)
        except UndecodableImage:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds on damaged files
            raise UndecodableImage(_reason(error)) from error


def _decode(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise UndecodableImage(f"the file is damaged or none of {', '.join(_FORMATS)}") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise UndecodableImage(f"the image is {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise UndecodableImage(f"the image claims {width}x{height} pixels, more than {MAX_PIXELS:,}")
    image.load()
    if "exif" in image.info:
        image = _upright(image)
    return _to_rgb(image)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata must not cost the picture
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray(_sixteen_to_eight(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise UndecodableImage("the image holds floating-point values of unknown range")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _sixteen_to_eight(values: np.ndarray) -> np.ndarray:
    """0..65,535 to 0..255, rounded; Pillow's own conversion would clip everything above 255 to white."""
    whole = np.clip(values.astype(np.int64), 0, 65_535)
    return ((whole + 128) // 257).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"the image claims more than {MAX_PIXELS:,} pixels"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"the image does not decode: {text[:_REASON_LENGTH]}"
