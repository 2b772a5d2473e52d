"""How large the kernels of convolutions are: their middle, in the same memory (arXiv 1908.09791, section 3.2).

A kernel of K x K holds smaller ones of odd sides, each with its centre where the whole's is. Both convolutions of a
block have one side; a block whose own is no larger than what is asked for stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regauge.anatomy.members import sides
from regauge.anatomy.model import Anatomy
from regauge.elastic.depth import Depth
from regauge.elastic.offers import Offers, Settled, listed
from regauge.elastic.subnet import Subnet

NONE = "the model has no convolutions in its blocks whose kernels could be smaller"
_BLOCKS = Depth()


@dataclass(frozen=True)
class Kernel:
    """The side of the kernels in each block."""

    name: str = "kernel"

    def refuses(self, choices: Sequence[Any], family: Offers, anatomy: Anatomy) -> Iterator[str]:
        own = sides(anatomy)
        if not own or max(own.values()) == 1:
            yield f"kernel: {NONE}"
            return
        if any(side % 2 == 0 for side in own.values()):
            yield "kernel: only square kernels of odd sides, the same in a block, have a centre"
            return
        for side in choices:
            if side > max(own.values()):
                yield f"kernel {side}: the largest kernels are {max(own.values())} x {max(own.values())}"

    def settle(self, value: Any, family: Offers, anatomy: Anatomy, before: Subnet) -> Settled:
        own = sides(anatomy)
        if not family.choices(self.name):
            return None, f"kernel={_spelled(value)}: this family has kernels of one size"
        blocks = _BLOCKS.blocks(before.depth, family, anatomy)
        values = value if isinstance(value, tuple) else (value,) * len(blocks)
        if len(values) != len(blocks):
            return None, f"kernel has {len(values)} numbers for {len(blocks)} blocks that run"
        whole, mine = max(own.values(), default=1), tuple(own.get(block, 1) for block in blocks)
        legal = sorted({*family.choices(self.name), whole})
        near = tuple(self._near(one, side, legal) for one, side in zip(values, mine, strict=True))
        known = all(one in legal or one == side for one, side in zip(values, mine, strict=True))
        wrong = "" if known else f"kernel={_spelled(value)}, of {listed(legal[::-1])}"
        if near == mine:
            return None, wrong
        one = next((side for side in legal if tuple(min(side, most) for most in mine) == near), None)
        return (near if one is None else one), wrong

    def _near(self, side: int, most: int, legal: Sequence[int]) -> int:
        """The choice nearest to a side in a block whose own is `most`, the larger of two."""
        some = {most, *(one for one in legal if one < most)}
        return most if side >= most else min(some, key=lambda one: (abs(one - side), -one))

    def kernels(self, value: Any, blocks: Sequence[int], anatomy: Anatomy) -> Mapping[int, int]:
        """Block of the whole → side, of those that lose some."""
        own = sides(anatomy)
        values = value if isinstance(value, tuple) else (value,) * len(blocks)
        return {block: side for side, block in zip(values, blocks, strict=True) if side < own.get(block, 1)}


def _spelled(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
