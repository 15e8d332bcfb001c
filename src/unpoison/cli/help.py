"""Help as aligned plain text: short to render, the same everywhere, quotable in the README."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_LABEL_WIDTH = 26  # longer labels get a line of their own
_GAP = 2


class AlignedHelp:
    """A cyclopts help formatter: one panel is a heading and two columns."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        labels = [_label(entry) for entry in panel.entries]
        width = min(max(map(len, labels)), _LABEL_WIDTH)
        title = str(getattr(panel.title, "plain", panel.title))
        lines = ["", f"{title}:"]
        for label, entry in zip(labels, panel.entries, strict=True):
            body = textwrap.wrap(_description(entry), max(options.max_width - width - _GAP - 2, 20)) or [""]
            if len(label) > width:
                lines.append(f"  {label}")
                label = ""
            lines.append(f"  {label:<{width}}{' ' * _GAP}{body[0]}".rstrip())
            lines += [" " * (2 + width + _GAP) + line for line in body[1:]]
        _write(console, "\n".join(lines))

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        text = _plain(usage)
        _write(console, text if text.startswith("Usage:") else f"Usage: {text}")

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        text = _plain(description)
        if text:
            wrapped = (textwrap.fill(line, options.max_width) for line in text.splitlines())
            _write(console, "\n".join(["", *wrapped]))


def _label(entry: HelpEntry) -> str:
    return ", ".join(entry.display_labels_with_metavar) if entry.metavar else ", ".join(entry.display_labels)


def _description(entry: HelpEntry) -> str:
    parts = [_plain(entry.description)]
    if entry.choices:
        parts.append(f"[choices: {', '.join(entry.choices)}]")
    if entry.default is not None:
        parts.append(f"[default: {entry.default}]")
    if entry.required:
        parts.append("[required]")
    return " ".join(filter(None, parts))


def _plain(thing: Any) -> str:
    if thing is None:
        return ""
    text = getattr(thing, "plain", None)
    if text is None:
        text = getattr(getattr(thing, "primary_renderable", None), "plain", None)
    return str(thing if text is None else text).strip()


def _write(console: Console, text: str) -> None:
    # Straight to the file: the text is already wrapped, and the console would style it.
    console.file.write(text + "\n")
