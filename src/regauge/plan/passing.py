"""What a rule of `tokens` comes to at each block of a model that draws scale by scale."""

from __future__ import annotations

from collections.abc import Mapping

from regauge import parts
from regauge.anatomy.model import Anatomy
from regauge.parts import Point
from regauge.plan.stores import block_of
from regauge.tokens.maps import Passing


def passing(points: Mapping[str, Point], anatomy: Anatomy) -> tuple[Passing | None, ...]:
    """What every block passes by: `blocks.2.residual` is what block 3 reads."""
    found: list[Passing | None] = [None] * anatomy.blocks
    for name, point in points.items():
        found[block_of(name) + 1] = Passing(**{axis: parts.build(axis, spec) for axis, spec in point})
    return tuple(found)
