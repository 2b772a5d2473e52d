"""Keeps what presets that train gained where `regauge methods` and `explain` read it (`report/trained.py`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from regauge.plan import presets

KEPT = Path(__file__).resolve().parents[2] / "src" / "regauge" / "presets" / "trained.json"


def keep(name: str, how: Mapping[str, str], figures: Mapping[str, Sequence[float]]) -> None:
    """A line a preset; those of others stay.

    Args:
        how: `command`, `model`, `unit` and what the `null` is.
        figures: where → the figure, the null's, and of paired ones the gap in percent and its standard error.
    """
    assert name in presets(), f"{name} is no preset"
    assert set(how) == {"command", "model", "unit", "null"}, how
    rows = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    rows[name] = {**how, "figures": {where: [float(f"{one:.4g}") for one in own] for where, own in figures.items()}}
    lines = ",\n".join(f" {json.dumps(one)}: {json.dumps(rows[one], ensure_ascii=False)}" for one in sorted(rows))
    KEPT.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
