"""What the commands that train say, in lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regauge.amounts import told
from regauge.cli.show import line, span, where

if TYPE_CHECKING:
    from regauge.artifact.receipt import Receipt
    from regauge.engine.recovery_cost import Planned
    from regauge.engine.training_cost import Planned as Training


def trained(done: Receipt, out: Path) -> None:
    """What a training did: each member before and after."""
    found = done.trained
    assert found is not None, "this receipt is of a training"
    line(f"{where(out)}: {found.unit} on {found.held_out:,} {found.counted} held out of {found.text}")
    for name, one in found.members.items():
        line(f"  {name:<28} {one.before:.4f} → {one.after:.4f}")
    if found.routed is not None:
        way = found.routed
        each = ", ".join(f"{name} {100 * share:.0f} %" for name, share in way.shares.items())
        line(f"  routed {way.routed:.4f} at {way.compute:.2f} of the products; by lot {way.by_lot:.4f}; {each}")
    if found.gated is not None:
        some = found.gated
        each = ", ".join(f"{name} {100 * share:.0f} %" for name, share in some.shares.items())
        line(f"  gated {some.gated:.4f} at {some.compute:.2f} of the neurons; by lot {some.by_lot:.4f}; {each}")
    line(f"  {found.steps:,} steps, {found.tokens:,} {found.counted}; {found.ended}")
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
