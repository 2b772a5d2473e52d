"""What the commands that train say, in lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regauge.amounts import told
from regauge.cli.show import line, span, where

if TYPE_CHECKING:
    from regauge.artifact.receipt import Receipt
    from regauge.engine.recovery_cost import Planned
    from regauge.engine.training_cost import Planned as Training


def trained(done: Receipt, out: Path) -> None:
    """What a training did: each member before and after."""
    told_of: dict[str, Any] = dict(done.trained)
    line(f"{where(out)}: {told_of['unit']} on {told_of['held_out']:,} tokens held out of {told_of['text']}")
    for name, found in told_of["members"].items():
        line(f"  {name:<28} {found['before']:.4f} → {found['after']:.4f}")
    line(f"  {told_of['steps']:,} steps, {told_of['tokens']:,} tokens of text; {told_of['ended']}")
    peak = f", peak memory {told(done.peak_bytes)} (anonymous)" if done.peak_bytes > 0 else ""
    line(f"  {told(done.bytes_after)} stored, {span(done.seconds)}{peak}")


def training_plan(plan: Training) -> None:
    """What a training would do, and what it would cost. Estimates are called so."""
    line(f"{plan.recipe} on {plan.model}: nothing is written")
    line(f"  members drawn of {plan.choices}; {plan.steps:,} steps of {plan.batch:,} tokens, {plan.passes:.1f} each")
    line(f"  about {span(plan.seconds)} on this machine, {told(plan.memory)} of memory, {told(plan.disk)} of disk")


def recovery_plan(plan: Planned) -> None:
    """What a recovery would do, and what it would cost. Estimates are called so."""
    line(f"{plan.artifact} towards {plan.original}: nothing is written")
    line(f"  {plan.parameters:,} numbers are trained; {plan.steps:,} steps of {plan.batch:,} tokens at most")
    line(f"  about {span(plan.seconds)} on this machine, {told(plan.memory)} of memory, {told(plan.disk)} of disk")
    for note in plan.notes:
        line(f"  note: {note}")
