"""`trace MODEL`: runs a model once and tells of every product of matrices whether it is one of integers."""

from __future__ import annotations

from pathlib import Path

from regauge.engine.watchdog import quiet_torch
from regauge.errors import ExactnessError
from regauge.hosts import host_of
from regauge.measure.products import Trace

TOKENS = 24
TOLD = 5


def trace(model: str | Path, *, integers: bool = False, family: str | Path | None = None, seed: int = 0) -> Trace:
    """Runs a model, an artifact or a plain checkpoint, on some tokens and records every product of its matrices.

    Args:
        model: its directory or hub id.
        integers: every product must be one of integers.
        family: a file of the user's own that says what an architecture is made of.
        seed: of the tokens, which are drawn by lot.

    Raises:
        ExactnessError: `integers` is asked for and some product is none; the sites are named.
        ModelError: no model, or one that reads no tokens.
    """
    with quiet_torch():
        host = host_of(model)
        with host.family(family), host.unsaid():
            products, unseen = host.trace(model, TOKENS, seed)
    found = Trace(model=str(model), tokens=TOKENS, products=products, unseen=unseen)
    if integers and not found.integer:
        told = [f"{one.name} ({one.why})" for one in found.floats]
        told += [f"{name} (no token reached it)" for name in found.unseen]
        more = f", and {len(told) - TOLD} more" if len(told) > TOLD else ""
        raise ExactnessError(
            f"{len(told)} of the {len(found.products) + len(found.unseen)} products of {model} are not of integers: "
            f"{', '.join(told[:TOLD])}{more}; give these weights and static inputs in the recipe."
        )
    return found
