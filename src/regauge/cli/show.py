"""Printing: JSON or tables on standard output, remarks on standard error."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from regauge.errors import printable

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
    """Text of any source as it is written: nothing in it colours, moves or clears."""
    print(printable(text, "\n\t"))


def remark(text: str) -> None:
    """For a person, beside the output."""
    print(printable(text, "\n\t"), file=sys.stderr)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table; columns whose cells all begin with a digit are set right."""
    shown = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for index, head in enumerate(heads):
        number = all(row[index][:1].isdigit() or row[index][:1] in "-−" for row in rows) and bool(rows)
        shown.add_column(printable(head), justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(printable, row))
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else WIDE)
    console.print(shown)


def span(seconds: float) -> str:
    """A length of time."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def where(path: Path | str) -> str:
    """A path as it was meant: relative where it is below here."""
    full, here = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)
