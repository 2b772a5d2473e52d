"""Which heads see a window only.

LS-attention (2505.15548) trains some heads short-range and the others long-range. In a trained model heads are classed
by how far back they look on calibration text; with grouped queries by the mean over the query heads of a KV head, or
one long-range query head would keep the whole history of the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from regauge.attention.base import DISTANCE, Local, Seen


@dataclass(frozen=True)
class ByDistance:
    """The heads that look back the least, over all the blocks of a rule together, see a window only.

    Attributes:
        short: how many of the heads, 0 to 1.
        tokens, sinks: what they see, as of `Local`. Sinks are left out of the distance too.
    """

    short: float = 0.5
    tokens: int = 64
    sinks: int = 1

    def __post_init__(self) -> None:
        _check(self.short, self.tokens, self.sinks)

    needs = frozenset((DISTANCE,))

    def __call__(self, blocks: Sequence[int], seen: Seen) -> dict[int, Local]:
        heads = [(float(far), block, head) for block in blocks for head, far in enumerate(seen.distances_K[block])]
        near = sorted(heads)[: round(self.short * len(heads))]
        return _locals([(block, head) for _, block, head in near], self.tokens, self.sinks)


@dataclass(frozen=True)
class ByLot:
    """As many heads drawn by lot: what any other way must beat."""

    short: float = 0.5
    tokens: int = 64
    sinks: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.short, self.tokens, self.sinks)

    needs = frozenset[str]()

    def __call__(self, blocks: Sequence[int], seen: Seen) -> dict[int, Local]:
        heads = [(block, head) for block in blocks for head in range(seen.kv_heads[block])]
        drawn = random.Random(self.seed).sample(heads, round(self.short * len(heads)))
        return _locals(drawn, self.tokens, self.sinks)


def _locals(heads: Sequence[tuple[int, int]], tokens: int, sinks: int) -> dict[int, Local]:
    found: dict[int, list[int]] = {}
    for block, head in sorted(heads):
        found.setdefault(block, []).append(head)
    return {block: Local("+".join(map(str, some)), tokens, sinks) for block, some in found.items()}


def _check(short: float, tokens: int, sinks: int) -> None:
    if not 0 < short <= 1:
        raise ValueError(f"a share of the heads is above 0 and at most 1, not {short}")
    Local("all", tokens, sinks)
