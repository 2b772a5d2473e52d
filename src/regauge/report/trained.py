"""What presets that train gained, each beside its null: what `benchmarks/trained_families.py` and `leaf.py` wrote."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

SHOWN = 3
"""Figures of a row that are told; the others are in the file."""


@cache
def kept() -> dict[str, Any]:
    """Preset → how it was measured (`command`, `model`), in what `unit`, and `figures`: where → its figure, that of its
    `null`, and where both were read on the same windows the gap in percent with its standard error."""
    found: dict[str, Any] = json.loads((files("regauge") / "presets" / "trained.json").read_text(encoding="utf-8"))
    return found


def told(name: str) -> str:
    """`perplexity of depth=4,ffn=0.6 19.22, alone 20.21 (-4.9 ± 0.5 %)`, of a preset that was measured; else ""."""
    row = kept().get(name)
    return "" if row is None else sentence(row)


def sentence(row: dict[str, Any]) -> str:
    """What `told` says of such a row."""
    found = []
    for where, (value, null, *gap) in list(row["figures"].items())[:SHOWN]:
        paired = f" ({gap[0]:+.1f} ± {gap[1]:.1f} %)" if gap else ""
        found.append(f"{where} {value:.4g}, {row['null']} {null:.4g}{paired}")
    return f"{row['unit']} of {'; '.join(found)}"


def how(name: str) -> str:
    """By what that was measured."""
    row = kept().get(name)
    return "" if row is None else f"{row['model']}; {row['command']}"
