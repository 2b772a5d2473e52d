"""Recipes beside each other on one model and text: KL to the original, paired against the first, bytes, CPU seconds.

    python benchmarks/recipes.py gptq-w2g64 imatrix-w2g64               # the bundled model on this project's sources
    python benchmarks/recipes.py gptq-w3g64 mine.yaml --model DIR --calibration TEXTS --eval HELD_OUT --tokens 32768
    python benchmarks/recipes.py gptq-w2g64 --instead rounder=gptq      # and each again with another part on an axis

All are held against the original on the same held-out windows; differences have their intervals over documents. Bytes
are those of the tensors' files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.heldout import HeldOut

import regauge as rg
from regauge import parts
from regauge.measure.quality import Scores, paired
from regauge.parts import WEIGHTS, Point
from regauge.plan import Plan, Rule, load

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 256


def with_parts(plan: Plan, instead: list[str]) -> Plan:
    """The plan with other parts on axes of its weights: `rounder=gptq`, `ranger=search`."""
    named = {axis: parts.read(axis, text, WEIGHTS) for axis, _, text in (word.partition("=") for word in instead)}

    def changed(rule: Rule) -> Rule:
        point = rule.point
        if point is None:
            return rule
        return Rule(rule.select, Point.of(WEIGHTS, {**dict(point.specs), **named}))

    places = {**plan.places, WEIGHTS: tuple(map(changed, plan.of(WEIGHTS)))}
    return replace(plan, name=f"{plan.name} {' '.join(instead)}", places=places)


def plans(given: argparse.Namespace) -> Iterator[Plan]:
    for name in given.recipes:
        plan = load(name)
        yield plan
        if given.instead:
            yield with_parts(plan, given.instead)


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    words.add_argument("recipes", nargs="+", help="presets or files")
    words.add_argument("--instead", nargs="+", default=[], help="AXIS=PART: each recipe again with it")
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--calibration", type=Path, default=ROOT / "src")
    words.add_argument("--eval", type=Path, default=ROOT / "tests")
    words.add_argument("--tokens", type=int, default=32768, help="that calibrate")
    words.add_argument("--read", type=int, default=30720, help="held-out tokens")
    given = words.parse_args()
    held = HeldOut(given.model, given.eval, LENGTH, given.read)
    first: Scores | None = None
    for plan in plans(given):
        with tempfile.TemporaryDirectory() as scratch:
            out, began = Path(scratch) / "out", time.process_time()
            rg.apply(plan, given.model, out, calibration=str(given.calibration), tokens=given.tokens)
            spent = time.process_time() - began
            size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            scores = held.scores(out)
        told = f"{plan.name:32} {float(scores.kl_N.mean()):9.5f} {size / 1e6:9.3f} MB {spent:7.1f} cpu s"
        if first is not None:
            gap = paired(scores, first, 0).difference
            told += f"  {gap.value:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}]"
        first = first or scores
        print(told, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
