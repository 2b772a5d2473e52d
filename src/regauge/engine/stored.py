"""A cache's rounding while a block is trained: keys and values as attention would read them from its codes.

The streaming pass itself runs without a cache; what is learnt with one in the plan is learnt for it. Only formats whose
steps belong to one token are seen: groups in time depend on which tokens lie together. Windows count as codes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from regauge.anatomy.inner import KEYS, VALUES
from regauge.anatomy.model import Anatomy
from regauge.cache.scheme import in_time
from regauge.formats.readings import Reading
from regauge.parts import Point
from regauge.plan.stores import block_cache
from regauge.runtime.store.sealing import turned

Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Stored:
    """What a cache gives back of rows (..., D), read as a `Reading` is: turned, rounded, and turned back.

    Attributes:
        turn: its own inverse.
    """

    reading: Reading
    turn: Turn

    def simulate(self, x: Tensor) -> Tensor:
        return self.turn(self.reading.simulate(self.turn(x)))

    def passed(self, x: Tensor) -> Tensor:
        """`simulate`, differentiable."""
        return self.turn(self.reading.passed(self.turn(x)))


def stored(anatomy: Anatomy, point: Point | None, block: int) -> dict[str, Stored]:
    """`keys` and `values` → what a cache by a rule gives back of them; of none, or of groups in time, nothing."""
    sizes = anatomy.attention(block)
    if point is None or sizes is None:
        return {}
    scheme, found = block_cache(point, sizes).scheme, dict[str, Stored]()
    for word, fmt, size in zip((KEYS, VALUES), scheme.formats, (sizes.head_dim, sizes.value_dim), strict=True):
        if fmt is not None and not scheme.balance and in_time(fmt) == 1:
            found[word] = Stored(Reading(fmt), turned(size) if scheme.hadamard else _same)
    return found


def _same(x: Tensor) -> Tensor:
    return x
