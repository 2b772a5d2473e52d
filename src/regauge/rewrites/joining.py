"""Scales of streams that are trained with all else that is learnt, and those that training found.

The engine trains them (`learn/joint.py`) before the streaming pass, with `learning: {scope: model}`; what it puts in
place of the part is `Known`, a list of moves a block, which are exact and certified like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move
from regauge.errors import RecipeError
from regauge.formats.base import JOINED
from regauge.formats.learnt import checked_rate
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics

KINDS = ("norm", "value", "qk", "ffn")


@dataclass(frozen=True)
class LearntScales:
    """A scale for each channel of norms' outputs, values, queries with keys, and neurons, trained (MobileQuant, arXiv
    2408.13933, its equivalent transformation).

    They begin where the rewrites before this one left the block, so `smooth-streams` or `smooth-norms` before it is the
    start that is published. Channels that rotary embeddings turn together share a scale, and one scale serves all heads
    of a group of queries.

    Cost: in each training step, a pass over the weights; nothing at run time.

    Attributes:
        rate: learning rate, of the logarithm of a scale.
        streams: kinds of streams that are scaled.
    """

    rate: float = 0.001
    streams: str = "norm+value+qk+ffn"
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({JOINED})
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        checked_rate(self.rate)
        for kind in self.streams.split("+"):
            if kind not in KINDS:
                raise RecipeError(f"learnt-scales: {kind!r} is no kind of stream to scale ({', '.join(KINDS)})")

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        """Nothing yet: this is where training begins."""
        return anatomy, []

    def of(self, anatomy: Anatomy, block: int) -> list[Stream]:
        """The streams of a block that are scaled."""
        kinds = self.streams.split("+")
        here = [stream for stream in anatomy.streams if stream.block == block and stream.kind in kinds]
        return [stream for stream in here if "scale" in stream.admits]


@dataclass(frozen=True, eq=False)
class Known:
    """Moves that are known before the block is read.

    Attributes:
        moves: block → its moves.
    """

    moves: Mapping[int, Sequence[Move]]
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset()
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        return anatomy, [] if block is None else list(self.moves.get(block, ()))
