"""Made-up pairs: captions, and pictures drawn for them by whatever the user has that draws."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from PIL import Image

from unpoison.data.captions import captions_dataset, clean_captions
from unpoison.data.pairs import ImageTextPairs
from unpoison.data.sources import check_skips, images_in_memory
from unpoison.errors import NotEnoughDataError
from unpoison.results import SkippedRow
from unpoison.runs import Run

Render = Callable[[str], Image.Image]


def render_pairs(
    captions: Sequence[str], render: Render, *, name: str = "rendered", run: Run | None = None
) -> ImageTextPairs:
    """One picture for each caption, drawn by ``render`` (a text-to-image model, a renderer): pairs to repair a CLIP on.

    A caption that is empty, or for which ``render`` raises or returns no picture, is listed in ``skipped``; more than a
    tenth of them are fatal. The pictures are held as PNG in memory. Raises SourceFormatError, NotEnoughDataError.
    """
    run = run or Run()
    drawn: list[bytes] = []
    kept: list[tuple[str, ...]] = []
    ids: list[str] = []
    skipped: list[SkippedRow] = []
    numbered = run.progress.track(
        list(enumerate(captions)), total=len(captions), what="drawing pictures", unit="pictures"
    )
    for row, caption in numbered:
        sample = f"{name}:{row}"
        cleaned = clean_captions([caption])
        picture = _draw(render, cleaned[0]) if cleaned else "no caption"
        if isinstance(picture, str):
            skipped.append(SkippedRow(id=sample, reason=picture))
            continue
        drawn.append(picture)
        kept.append(cleaned)
        ids.append(sample)
    check_skips(tuple(skipped), len(captions), name)
    if not ids:
        raise NotEnoughDataError(f"{name}: pictures", have=0, need=1, hint="Give captions.")
    return ImageTextPairs(
        name=name,
        dataset=images_in_memory(drawn),
        ids=ids,
        skipped=tuple(skipped),
        texts=captions_dataset(kept),
    )


def _draw(render: Render, caption: str) -> bytes | str:
    """The picture as PNG, else the reason why there is none."""
    try:
        picture = render(caption)
    except Exception as error:  # whatever a renderer raises costs this picture alone
        return f"the renderer failed ({type(error).__name__}: {error})"
    if not isinstance(picture, Image.Image):
        return f"the renderer returned a {type(picture).__name__}, no picture"
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
