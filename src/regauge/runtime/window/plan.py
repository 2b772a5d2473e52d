"""Which blocks stay in memory and which stream: pure arithmetic on sizes.

A token needs every block once, in the same order, again and again. LRU is the worst policy for that: with one block too
many it has always just dropped the one that comes next, and reads all L blocks a token. Belady's, the best there can
be, reads L (L − C) / (L − 1) with room for C blocks. One of the C is always being filled here, which leaves it C − 1,
so it would read L (L − C + 1) / (L − 1), between L − C + 1 and L − C + 2. Pinning C − 2 blocks for good and passing the
others through two slots reads L − C + 2: less than one block more than the best, and every token alike.

The streamed blocks stand evenly among the pinned ones, so that the disk works all the time: with the pinned ones first,
it would fill its slots and then wait until they have all run.

Reference: TPI-LLM, arXiv 2410.00531: a sliding window over a model's layers, whose reads overlap with computing. There
everything slides; here what fits beside the window never moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regauge import amounts
from regauge.errors import BudgetError

SLOTS = 2
"""Blocks of the window: the one that runs and the one that is read."""


@dataclass(frozen=True)
class Plan:
    """What the figure is spent on, in bytes.

    Attributes:
        figure: the bound.
        outer: embeddings, norms, biases, head, rotary tables: always resident.
        workspace: cache and activations.
        blocks: size of each block.
        streamed: numbers of the blocks that are read from disk, ascending.
    """

    figure: int
    outer: int
    workspace: int
    blocks: tuple[int, ...]
    streamed: tuple[int, ...]

    @property
    def pinned(self) -> tuple[int, ...]:
        """Numbers of the blocks that stay."""
        return tuple(sorted(set(range(len(self.blocks))) - set(self.streamed)))

    @property
    def slots(self) -> int:
        return SLOTS if self.streamed else 0

    @property
    def slot_bytes(self) -> int:
        """Of one slot: the largest block that passes through it."""
        return max((self.blocks[number] for number in self.streamed), default=0)

    @property
    def weights(self) -> int:
        """Resident bytes of weights, slots included."""
        return self.outer + sum(self.blocks[number] for number in self.pinned) + self.slots * self.slot_bytes

    @property
    def bytes_per_token(self) -> int:
        """Read from disk for each pass over the model."""
        return sum(self.blocks[number] for number in self.streamed)


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` numbers, as evenly as they go; the last number is always among them.

    >>> spread(3, 8)
    (2, 5, 7)
    """
    return tuple(number for number in range(total) if (number + 1) * count // total > number * count // total)


def make_plan(figure: int, outer: int, workspace: int, blocks: Sequence[int], text: str = "", loading: int = 0) -> Plan:
    """The plan that reads the fewest blocks a token within the figure.

    Args:
        text: what the user wrote, for the error.
        loading: bytes needed at some moment before the blocks are resident.

    Raises:
        BudgetError: nothing fits; it names the least figure that does.
    """
    total = len(blocks)
    plans = [Plan(figure, outer, workspace, tuple(blocks), spread(count, total)) for count in _counts(total)]
    for plan in plans:
        if max(plan.weights + workspace, loading) <= figure:
            return plan
    least = max(min(plan.weights for plan in plans) + workspace, loading)
    raise BudgetError(
        f"{text or f'memory={figure}'} is too little: {amounts.told(outer)} of embeddings, norms and head, a window of "
        f"{SLOTS} blocks and {amounts.told(workspace)} of cache and activations need memory='{amounts.enough(least)}'."
    )


def _counts(total: int) -> list[int]:
    """How many blocks may stream: with as many as there are slots, or fewer, they would rather stay."""
    return [0, *range(SLOTS + 1, total + 1)]
