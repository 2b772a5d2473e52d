"""Records as a short table: text for a terminal, HTML for a notebook. Whatever they hold is shown as it is written."""

from __future__ import annotations

import html
from collections.abc import Sequence

Short = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""A title, heads, rows."""


def text(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title, and columns wide enough for what is in them; all but the first set right."""
    widths = [max(len(row[place]) for row in (heads, *rows)) for place in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        cells = [
            f"{row[0]:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([title, *(f"  {line(row)}" for row in (heads, *rows))])


def page(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML."""

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<p>{html.escape(title)}</p><table>{line(heads, 'th')}{body}</table>"
