"""``unpoison keep``: write a clean copy of a scanned set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from unpoison.cli.options import Common, Reading

if TYPE_CHECKING:
    import rich.console

    from unpoison.keep import Selection


def keep(
    scan: Path,
    /,
    *,
    output: Annotated[
        Path, Parameter(name=["--output", "-o"], help="New parquet file; an existing one is refused.")
    ] = Path("clean.parquet"),
    decisions: Annotated[
        Path | None,
        Parameter(
            show_default=False, help="Decisions exported from the report, or a CSV file: id, decision (keep or drop)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        Parameter(
            metavar="SOURCE", show_default=False, help="The scanned source, where it is now. [default: as scanned]"
        ),
    ] = None,
    reading: Reading = Reading(),
    options: Common = Common(),
) -> int:
    """Write a clean copy of a scanned set: suspect samples are left out, decisions overrule the scan.

    Nothing is deleted or overwritten; the source stays as it is.

    Parameters
    ----------
    scan
        Run folder of `unpoison scan dataset` or of `unpoison purify`.
    """
    from unpoison.cli.console import Console

    with Console(options) as console:
        console.detail("importing libraries")
        from unpoison.errors import UsageError
        from unpoison.keep import locate, read_decisions, read_split, select_clean, write_clean_copy

        if output.exists():
            raise UsageError(f"{output} exists.", hint="Choose another -o file; nothing was overwritten.")
        split = read_split(scan)
        selection = select_clean(split, read_decisions(decisions) if decisions is not None else {})
        source = _scanned_source(scan, data, reading)
        unread = write_clean_copy(source, locate(source, split, selection.rows), output, progress=console)
        counts: dict[str, Any] = {name: value for name, value in asdict(selection).items() if name != "rows"}
        counts |= {"kept": selection.kept - len(unread), "unreadable": [asdict(row) for row in unread]}
        console.answer({"file": str(output), **counts}, lambda out: _show(out, selection, len(unread), output))
    return 0


def _scanned_source(scan: Path, data: str | None, reading: Reading) -> Any:
    """The source as run.json remembers it, or where the user says it is now."""
    import msgspec

    from unpoison.cli.running import open_source
    from unpoison.data.pairs import open_pairs
    from unpoison.errors import ResultError, SourceFormatError

    try:
        inputs = msgspec.json.decode((scan / "run.json").read_bytes())
        stored, source = inputs["reading"], inputs["source"]
        seed = inputs["seed"]
        if not (isinstance(stored, dict) and isinstance(source, str) and isinstance(seed, int)):
            raise TypeError("reading, source or seed has another type")
    except (OSError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise ResultError(
            f"{scan / 'run.json'} does not tell what was scanned ({error}).", hint="Repeat the scan in a new folder."
        ) from error
    if reading == Reading():
        names = stored.get("class_names")
        reading = Reading(
            image_column=stored.get("image_column"),
            label_column=stored.get("label_column"),
            class_names=None if names is None else Path(str(names)),
            split=stored.get("split"),
        )
    try:
        if inputs.get("pairs"):
            return open_pairs(
                source if data is None else data, image_column=reading.image_column,
                caption_column=stored.get("caption_column"), split=reading.split, seed=seed,
            )  # fmt: skip
        # Without the limit: which rows were scanned is in the split, by id.
        return open_source(source if data is None else data, reading, seed=seed)
    except SourceFormatError as error:
        if data is None:
            error.hint = f"It was scanned as {source!r}; say where it is now with --data. {error.hint}"
        raise


def _show(out: rich.console.Console, selection: Selection, unread: int, path: Path) -> None:
    out.print(f"{selection.kept - unread:,} samples written to {path}", soft_wrap=True)
    out.print(
        f"  of them {selection.kept_mixed:,} of the mixed region, {selection.kept_by_decision:,} by decision\n"
        f"{selection.dropped_suspect:,} suspect samples and {selection.dropped_by_decision:,} by decision left out"
    )
    if selection.skipped or unread:
        out.print(f"{selection.skipped + unread:,} samples left out because they could not be read")
