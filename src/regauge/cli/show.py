"""Printing: JSON or tables on standard output, remarks on standard error."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from regauge.errors import printable

PADDING = 4  # columns between two
WIDE = 160  # columns where the output is no terminal, so that a pipe gets whole rows


def plain(value: object) -> Any:
    """Records and paths as JSON can hold them."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def as_json(value: object) -> None:
    """One JSON document on standard output; numbers that JSON lacks become null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=True)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2, ensure_ascii=False)
    print(text)


def line(text: str = "") -> None:
    """Text of any source as it is written: nothing in it colours, moves or clears. A terminal gets whole words."""
    shown, wide = printable(text, "\n\t"), columns()
    if wide is not None:
        shown = "\n".join(_wrapped(one, wide) for one in shown.split("\n"))
    print(shown)


def columns() -> int | None:
    """Columns of the terminal; None where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _wrapped(text: str, wide: int) -> str:
    """One line on as many as it needs, what follows the first set in; no word is broken."""
    if len(text) <= wide:
        return text
    indent = " " * (len(text) - len(text.lstrip(" ")) + 2)
    return textwrap.fill(
        text, wide, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def remark(text: str) -> None:
    """For a person, beside the output."""
    print(printable(text, "\n\t"), file=sys.stderr)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table; columns whose cells all begin with a digit are set right. Where it is too wide for a terminal to hold
    without breaking words, each row is told on lines of its own."""
    wide = columns()
    widths: Sequence[int | None] = [None] * len(heads)  # a pipe gets what rich makes of them
    if wide is not None:
        least = _least(heads, rows)
        if sum(least) + PADDING * len(least) > wide:
            _told(heads, rows, title)
            return
        most = [max(len(printable(row[place])) for row in (heads, *rows)) for place in range(len(heads))]
        widths = _shared(least, most, wide)
    shown = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for index, (head, width) in enumerate(zip(heads, widths, strict=True)):
        number = all(row[index][:1].isdigit() or row[index][:1] in "-−" for row in rows) and bool(rows)
        shown.add_column(printable(head), justify="right" if number else "left", overflow="fold", width=width)
    for row in rows:
        shown.add_row(*map(printable, row))
    Console(highlight=False, markup=False, emoji=False, width=wide or WIDE).print(shown)


def _least(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Columns of each column below which a word in it would be broken."""
    return [
        max(len(word) for row in (heads, *rows) for word in (printable(row[place]).split() or [""]))
        for place in range(len(heads))
    ]


def _shared(least: Sequence[int], most: Sequence[int], wide: int) -> list[int]:
    """Columns of each column: its longest word at the least, and what is left to those whose cells are longer."""
    found = list(least)
    left = wide - sum(found) - PADDING * len(found)
    while left > 0 and any(have < want for have, want in zip(found, most, strict=True)):
        neediest = max(range(len(found)), key=lambda place: most[place] / max(1, found[place]))
        found[neediest] += 1
        left -= 1
    return found


def _told(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    line(title)
    for row in rows:
        first, *others = zip(heads, row, strict=True)
        line(f"  {' '.join(part for part in first if part)}")
        line("    " + "; ".join(f"{head} {cell}".strip() for head, cell in others if cell))


def span(seconds: float) -> str:
    """A length of time."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def where(path: Path | str) -> str:
    """A path as it was meant: relative where it is below here."""
    full, here = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)
