"""How one block's store keeps its older tokens, as data: what a recipe's rule of `cache` comes to.

A store is a window of the newest tokens, whole, behind blocks of older ones in their formats. A block is sealed when
all of its tokens have left the window: `sealed` is a pure function of how many were seen, so the same keys and values
give the same codes in whatever pieces they come. KIVI (arXiv 2402.02750) seals keys R at a time and values one by one;
here keys and values of the same tokens are sealed together.

Legend: T tokens, D channels of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from regauge.formats.base import Format

TOKENS, LEAST, MOST = 32, 16, 512
"""Tokens of a block that no group in time decides, what every block is a multiple of, and the most."""
HADAMARD = 8
"""Channels of the smallest Hadamard that is worth its turn; a head is turned in its largest powers of two."""
STEP, ROW = 2, 4
"""Bytes of a step or of the value of code 0, and of a token's multiplier."""


@dataclass(frozen=True)
class Variance:
    """Channels and tokens of a block divided by their spread, in turn, until both are even (Sinkhorn's iteration;
    KVarN, arXiv 2606.03458): a token of unusual size no longer widens the steps of its group. Channels' multipliers go
    into their steps; each token keeps one of its own.

    Attributes:
        rounds: how often both are divided.
    """

    rounds: int = 4

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"balancing takes one round at least, not {self.rounds}")


@dataclass(frozen=True)
class Trigger:
    """When tokens are let go.

    Attributes:
        kind: `prefill`: once, behind the text that generation begins with. `every`: then, and again when so many have
            come. `at`: whenever a head holds so many.
        tokens: so many; 0 for `prefill`.
    """

    kind: str
    tokens: int

    def __post_init__(self) -> None:
        if self.kind != "prefill" and self.tokens < 1:
            raise ValueError(f"a trigger counts tokens, one at least, not {self.tokens}")


AFTER_PREFILL = Trigger("prefill", 0)


@dataclass(frozen=True)
class Scheme:
    """One block's store; how many heads it has and how large they are is the model's.

    Attributes:
        keys, values: the formats of sealed blocks, each over (T, D) of one head, fallbacks taken; None: as they come.
        window: the newest tokens, which stay whole.
        hadamard: whether keys and values are both held turned by a Hadamard of the head's size.
        balance: rounds of balancing before tokens are rounded (`Variance`); 0: none.
    """

    keys: Format | None = None
    values: Format | None = None
    window: int = 0
    hadamard: bool = False
    balance: int = 0

    @property
    def formats(self) -> tuple[Format | None, Format | None]:
        """Of keys and of values."""
        return self.keys, self.values

    @property
    def whole(self) -> bool:
        """Whether nothing is rounded."""
        return self.keys is None and self.values is None

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return tokens_of(*self.formats)

    def sealed(self, seen: int) -> int:
        """How many of the tokens seen lie in blocks: always the oldest, and whole blocks."""
        return 0 if self.whole else behind(seen, self.window, self.tokens)

    def bytes(self, seen: int, heads: int, sizes: tuple[int, int], itemsize: int = 2) -> int:
        """Bytes that a sequence of so many tokens takes in one block, by the formats; the room to grow is not counted.

        Args:
            heads: of keys and values.
            sizes: channels of a key and of a value.
            itemsize: bytes of a number that is not rounded.
        """
        sealed = self.sealed(seen)
        blocks = sealed // self.tokens
        one = sum(self._block(fmt, size, itemsize) for fmt, size in zip(self.formats, sizes, strict=True))
        return heads * (blocks * one + (seen - sealed) * sum(sizes) * itemsize)

    def rate(self, heads: int, sizes: tuple[int, int], itemsize: int = 2) -> float:
        """Bytes that another token of a long text takes in one block: what `bytes` grows by."""
        if self.whole:
            return float(heads * sum(sizes) * itemsize)
        one = sum(self._block(fmt, size, itemsize) for fmt, size in zip(self.formats, sizes, strict=True))
        return heads * one / self.tokens

    def _block(self, fmt: Format | None, size: int, itemsize: int) -> int:
        if fmt is None:
            return self.tokens * size * itemsize
        groups, _ = fmt.grain.groups((self.tokens, size))
        steps = groups * STEP * (1 if fmt.grid.symmetric else 2)
        return self.tokens * size * fmt.grid.bits // 8 + steps + (self.tokens * ROW if self.balance else 0)


def behind(seen: int, window: int, tokens: int) -> int:
    """Of so many tokens seen those behind the window that fill whole blocks of `tokens`."""
    return max(0, seen - window) // tokens * tokens


def tokens_of(keys: Format | None, values: Format | None) -> int:
    """Tokens of a block that holds whole groups of both: of those in time, or else `TOKENS`."""
    spans = [span for span in (in_time(fmt) for fmt in (keys, values) if fmt is not None) if span > 1]
    return math.lcm(*spans) if spans else TOKENS


def in_time(fmt: Format) -> int:
    """Tokens that share a step; 1 where each has its own."""
    shape = (1 << 20, 2)  # of a text that every group in time divides
    return fmt.grain.groups(shape)[1] if fmt.grain.span(shape) == 1 else 1


@dataclass(frozen=True)
class Policy:
    """Which tokens a block lets go: parts of `cache/scores`, `budgets` and `disposals`, and when.

    Attributes:
        score: higher is kept.
        budget: how many stay, by head.
        disposal: what becomes of the others.
    """

    score: Any
    budget: Any
    disposal: Any
    trigger: Trigger = AFTER_PREFILL


@dataclass(frozen=True)
class BlockCache:
    """What one block keeps.

    Attributes:
        merge: the part of `cache/merges` by which this block shares with the one before it; None: it does not.
    """

    scheme: Scheme = Scheme()
    policy: Policy | None = None
    merge: Any = None


@dataclass(frozen=True)
class CachePlan:
    """What every block of a model keeps.

    Attributes:
        name: the recipe's.
        blocks: block → what it keeps; None: everything as it comes, as without a plan. A block behind a sliding window
            is among these.
        notes: what a reader must know, a sentence each.
    """

    name: str
    blocks: tuple[BlockCache | None, ...]
    notes: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether nothing is kept otherwise than without a plan."""
        return all(block is None for block in self.blocks)
