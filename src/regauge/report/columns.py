"""Text in columns, and the parts of a told fact: what `explain` prints is made of these."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

Facts = dict[str, object]


def link(cite: object) -> str:
    """An arXiv id as an address."""
    told = str(cite).removeprefix("arXiv:")
    return f"https://arxiv.org/abs/{told}" if re.fullmatch(r"\d{4}\.\d{4,5}", told) else told


def pairs(told: Mapping[str, str]) -> list[str]:
    """Label and wrapped text, labels in a column; empty texts are left out."""
    lines = []
    for label, text in told.items():
        if text:
            first, *rest = textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False)
            lines += [f"  {label:<9}{first}", *(f"  {'':<9}{line}" for line in rest)]
    return lines


def columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  " + "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]


def listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []


def rows_of(value: object) -> list[dict[str, str]]:
    return [dict(row) for row in listed(value) if isinstance(row, dict)]


def facts_of(value: object) -> list[Facts]:
    return [dict(row) for row in listed(value) if isinstance(row, dict)]
