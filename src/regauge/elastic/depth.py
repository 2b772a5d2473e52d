"""How many blocks run, or which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from regauge.anatomy.model import Anatomy
from regauge.elastic.family import STAGES
from regauge.elastic.offers import Offers, Settled, listed, units
from regauge.elastic.stages import lacking, staged
from regauge.elastic.subnet import Amount, Subnet


@dataclass(frozen=True)
class Depth:
    """How many blocks run, or which."""

    name: str = "depth"

    def refuses(self, choices: Sequence[Any], family: Offers, anatomy: Anatomy) -> Iterator[str]:
        for count in choices:
            if not 1 <= self._count(count, anatomy) <= anatomy.blocks:
                yield f"depth {count}: the model has {anatomy.blocks} blocks"
            elif lost := lacking(self.blocks(self._count(count, anatomy), family, anatomy), anatomy):
                yield f"depth {count}: {lost}; layers: stages keeps the first blocks of each stage"

    def settle(self, value: Any, family: Offers, anatomy: Anatomy, before: Subnet) -> Settled:
        legal = sorted({*(self._count(one, anatomy) for one in family.choices(self.name)), anatomy.blocks})
        count = len(value) if isinstance(value, tuple) else self._count(value, anatomy)
        near = min(legal, key=lambda one: (abs(one - count), -one))
        if isinstance(value, tuple) and (list(value) != sorted(set(value)) or max(value) >= anatomy.blocks):
            told = "/".join(map(str, value))
            return self._said(near, anatomy), f"depth={told} is no rising list of blocks from 0 to {anatomy.blocks - 1}"
        if count != near:
            return self._said(near, anatomy), f"depth={count}, of {listed(legal)}"
        if isinstance(value, tuple) and (lost := lacking(value, anatomy)):
            return self._said(near, anatomy), f"depth={'/'.join(map(str, value))}: {lost}"
        if isinstance(value, tuple) and value != self.blocks(count, family, anatomy):
            return value, ""
        return self._said(count, anatomy), ""

    def _count(self, value: Amount, anatomy: Anatomy) -> int:
        return value if isinstance(value, int) else units(value, anatomy.blocks, 1)

    def _said(self, count: int, anatomy: Anatomy) -> int | None:
        return None if count == anatomy.blocks else count

    def blocks(self, value: Any, family: Offers, anatomy: Anatomy) -> tuple[int, ...]:
        """The blocks that run."""
        if isinstance(value, tuple):
            return value
        if value is None:
            return tuple(range(anatomy.blocks))
        return staged(value, anatomy) if family.layers == STAGES else family.blocks(value, anatomy.blocks)
