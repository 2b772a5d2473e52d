"""Which blocks take the attention probabilities of an earlier one, and drop their queries and keys.

EchoAtt (2409.14595) puts inner blocks whose maps are alike into groups; the first of a group computes the map and the
others take it. The first and the last block of the model are in no group. Alone, without the distilling that the paper
does after, this costs quality: what it costs is measured.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from regauge.attention.base import LIKENESS, Seen
from regauge.errors import RecipeError

REACH = 8
"""How many blocks before it a block may take its map from: so many maps are kept while text is read."""


@dataclass(frozen=True)
class Alike:
    """The groups whose blocks are most alike, counting each against the first of its group: exact, by dynamic
    programming.

    Attributes:
        amount: of all blocks of the model how many take a map, 0 to 1 (EchoAtt's are 0.23, 0.41 and 0.77); from 1 on
            a number of blocks.
    """

    amount: float

    def __post_init__(self) -> None:
        _check(self.amount)

    needs = frozenset((LIKENESS,))

    def __call__(self, blocks: Sequence[int], total: int, seen: Seen) -> dict[int, int]:
        inner, count = _inner(blocks, total), _count(self.amount, blocks, total)
        # best[n]: (likeness, leaders) of the blocks so far with n of them taking; the last leader stands last
        best: dict[tuple[int, int], tuple[float, dict[int, int]]] = {(0, inner[0]): (0.0, {})}
        for block in inner[1:]:
            after: dict[tuple[int, int], tuple[float, dict[int, int]]] = {}
            for (taking, leader), (alike, led) in best.items():
                ways = [((taking, block), alike, led)]
                if _near(inner, leader, block) and taking < count:
                    ways.append(((taking + 1, leader), alike + seen.alike[block, leader], {**led, block: leader}))
                for key, value, found in ways:
                    if key not in after or value > after[key][0]:
                        after[key] = (value, found)
            best = after
        ended = [found for (taking, _), found in best.items() if taking == count]
        if not ended:
            raise RecipeError(_few(self.amount, total))
        return max(ended, key=lambda found: found[0])[1]


@dataclass(frozen=True)
class Lot:
    """As many blocks drawn by lot: what any other way must beat.

    Attributes:
        amount: as of `Alike`.
    """

    amount: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.amount)

    needs = frozenset[str]()

    def __call__(self, blocks: Sequence[int], total: int, seen: Seen) -> dict[int, int]:
        inner, count = _inner(blocks, total), _count(self.amount, blocks, total)
        able = [block for before, block in itertools.pairwise(inner) if block == before + 1]
        draw = random.Random(self.seed)
        for _ in range(1000):
            if count > len(able):
                break
            taking, led = set(draw.sample(able, count)), dict[int, int]()
            for block in sorted(taking):
                led[block] = led.get(block - 1, block - 1)
            if all(_near(inner, leader, block) for block, leader in led.items()):
                return led
        raise RecipeError(_few(self.amount, total))


@dataclass(frozen=True)
class Of:
    """The map of one block that is named.

    Attributes:
        block: its number, from 0.
    """

    block: int

    needs = frozenset[str]()

    def __call__(self, blocks: Sequence[int], total: int, seen: Seen) -> dict[int, int]:
        wrong = [block for block in blocks if not 0 <= self.block < block]
        if wrong:
            raise RecipeError(f"block {wrong[0]} takes the map of an earlier block, and {self.block} is none")
        return dict.fromkeys(blocks, self.block)


def _check(amount: float) -> None:
    if not (0 < amount < 1 or amount == int(amount) > 0):
        raise ValueError(f"a share of the blocks is above 0 and below 1, or a number of them, not {amount}")


def _inner(blocks: Sequence[int], total: int) -> list[int]:
    """Those that may be in a group."""
    found = sorted(block for block in blocks if 0 < block < total - 1)
    if len(found) < 2:
        raise RecipeError(
            f"of {total} blocks, {len(found)} can be in a group, and it takes two: the first and the last block never "
            "share attention maps"
        )
    return found


def _count(amount: float, blocks: Sequence[int], total: int) -> int:
    count = int(amount) if amount >= 1 else max(1, round(amount * total))
    if count > len(_inner(blocks, total)) - 1:
        raise RecipeError(_few(amount, total))
    return count


def _few(amount: float, total: int) -> str:
    return (
        f"{amount:g} of {total} blocks cannot take another's attention map: neither the first nor the last block does, "
        f"one of each group computes it, and a group spans {REACH + 1} blocks at most"
    )


def _near(inner: Sequence[int], leader: int, block: int) -> bool:
    """Whether all blocks between them are there, and few enough."""
    return block - leader <= REACH and all(between in inner for between in range(leader, block))
