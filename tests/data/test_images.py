"""Decoding: every kind of picture becomes upright 8-bit RGB, everything else a reason."""

import contextlib
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unpoison.data.images import MAX_PIXELS, UndecodableImage, decode_image, quiet_pillow


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


RGB = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
PICTURE = Image.fromarray(RGB)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    assert np.array_equal(np.asarray(decode_image(encode(PICTURE, kind))), RGB)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_come_close(kind: str) -> None:
    smooth = Image.fromarray(np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8))
    decoded = decode_image(encode(smooth, kind))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - (200, 40, 90)).max() <= 6


MODES = ["L", "1", "P", "RGBA", "LA", "I;16", "RGB"]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for kind in ("PNG", "TIFF") for mode in MODES] + [("CMYK", "TIFF"), ("CMYK", "JPEG")],
)
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    white = Image.fromarray(np.full((8, 8), 65535, np.uint16)) if mode == "I;16" else None
    image = white or Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    decoded = decode_image(encode(image, kind))
    assert decoded.mode == "RGB"
    assert decoded.size == (8, 8)
    assert np.asarray(decoded).min() >= 254


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert decode_image(encode(half)).getpixel((0, 0)) == pytest.approx((127, 127, 127), abs=1)
    gray = Image.new("LA", (4, 4), (0, 0))
    assert decode_image(encode(gray)).getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    for data in (encode(image, transparency=0), encode(image, "GIF", transparency=0)):
        decoded = decode_image(data)
        assert decoded.getpixel((0, 0)) == (255, 255, 255)
        assert decoded.getpixel((1, 1)) == (10, 20, 30)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    if kind == "PPM":
        data = b"P5 4 1 65535\n" + values.astype(">u2").tobytes()
    else:
        data = encode(Image.fromarray(values), kind)
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left goes to the top
    decoded = np.asarray(decode_image(encode(Image.fromarray(pixels), kind, exif=exif)))
    assert decoded.shape == (32, 16, 3)
    assert decoded[:14].min() > 200
    assert decoded[18:].max() < 50


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encode(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    assert decode_image(data).size == (8, 8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_many(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, _ = decode_image(data).getpixel((4, 4))  # pyright: ignore[reportGeneralTypeIssues]
    assert red > 200
    assert green < 50


HOSTILE = {
    "empty": b"",
    "text": b"not an image at all",
    "html": b"<html><script>alert(1)</script></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n",
    "header only": encode(PICTURE)[:20],
    "truncated png": encode(PICTURE)[:-60],
    "truncated jpeg": encode(Image.fromarray(np.tile(RGB, (8, 8, 1))), "JPEG")[:-700],
    "truncated gif": encode(PICTURE, "GIF")[:40],
    "truncated bmp": encode(PICTURE, "BMP")[:80],
    "truncated tiff": encode(PICTURE, "TIFF")[:60],
    "0x0 png": png_claiming(0, 0),
    "0x0 gif": b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\x02\x02D\x01\0;",
    "bomb": png_claiming(50_000, 50_000),
    "small bomb": png_claiming(9_000, 9_000),
    "warned bomb": png_claiming(10_000, 10_000),
    "float": encode(Image.new("F", (4, 4), 0.5), "TIFF"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(UndecodableImage) as caught:
        decode_image(data)
    assert caught.value.reason
    assert " at 0x" not in caught.value.reason
    assert "<" not in caught.value.reason


def test_bombs_are_refused_by_their_header() -> None:
    assert MAX_PIXELS < 9_000 * 9_000
    with pytest.raises(UndecodableImage, match=r"9000x9000 pixels, more than 64,000,000"):
        decode_image(HOSTILE["small bomb"])


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    cut=st.integers(0, 400),
    flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=6),
)
def test_damage_gives_a_picture_or_a_reason_and_nothing_else(kind: str, cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(encode(PICTURE, kind))
    for place, value in flips:
        data[place % len(data)] = value
    damaged = bytes(data[: max(0, len(data) - cut)]) if cut else bytes(data)
    mode = "RGB"
    with contextlib.suppress(UndecodableImage):
        mode = decode_image(damaged).mode
    assert mode == "RGB"


def test_warning_filters_are_as_before_once_all_threads_are_done() -> None:
    before = list(warnings.filters)
    started = threading.Barrier(3)

    def work(count: int) -> None:
        started.wait()
        for _ in range(count):
            with quiet_pillow:
                decode_image(encode(PICTURE))

    threads = [threading.Thread(target=work, args=(count,)) for count in (3, 30)]
    for thread in threads:
        thread.start()
    started.wait()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
