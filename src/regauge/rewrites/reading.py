"""Smoothing by what a stream's readers lose: one strength for each set of them, by the error of rounding them alone.

s_j = (E|x_j|)^r, at least 1e-4, divided by √(max s · min s) (AWQ, 2306.00978): columns of weights that meet large
inputs are made larger before they are rounded, so that their relative error falls; the input is divided by s. r = 0
changes nothing. Cost: one pass of calibration for E|x_j|, and `len(POWERS)` runs of a block for each set of readers;
nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.errors import RecipeError
from regauge.formats.base import OBJECTIVE
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics
from regauge.rewrites.smoothing import kinds_of, read, why_not

POWERS = tuple(round(i / 20, 2) for i in range(20))
"""r = 0, 1/20, …, 19/20, as AWQ's released code has them."""
FLOOR = 1e-4
Choose = Callable[[Anatomy, Weights, Sequence[Stream]], tuple[list[Move], list[str]]]
"""Moves of one set of streams, and what to say of them."""


@dataclass(frozen=True)
class SmoothReaders:
    """Each set of readers of a block with a strength of its own (AWQ, 2306.00978): q, k and v; o; gate and up; down.

    The strength is the one of `POWERS` with which rounding these readers to nearest, and nothing else, changes the
    block's output least, on what the uncompressed model puts into the block.

    Where we differ: AWQ takes the change of the attention's or the feed-forward's own output, or of the layer's for o
    and down; of feed-forwards that is ours, errors in attention we see through the feed-forward too. It smooths values
    only without grouped queries; here one scale serves all heads of a KV group. Experts of a block share a strength.
    """

    streams: str = "norm+value+ffn"
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"absmean", "count", OBJECTIVE})
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        kinds_of(self.streams, "smooth-readers")

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        who = "smooth-readers"
        if objective is None:
            raise RecipeError(f"{who}: strengths are chosen by a block's error, and nothing gives it here")
        kinds = kinds_of(self.streams, who)
        here = [s for s in anatomy.streams if s.block == block and s.kind in kinds]

        def choose(anatomy: Anatomy, weights: Weights, of: Sequence[Stream]) -> tuple[list[Move], list[str]]:
            made, note = _chosen(anatomy, weights, stats, of, objective)
            return made, [note]

        after, moves, notes = by_sets((anatomy, weights), here, stats, who, choose)
        return after.with_(notes=(*after.notes, *notes)), moves


def by_sets(
    model: tuple[Anatomy, Weights], streams: Sequence[Stream], stats: Statistics, who: str, choose: Choose
) -> tuple[Anatomy, list[Move], list[str]]:
    """The moves that `choose` makes of one set of readers after the other, each on what those before it have left; what
    it notes, and which streams cannot move."""
    anatomy, weights = model
    notes = [note for stream in streams if (note := why_not(stream, stats, who))]
    moves: list[Move] = []
    for of in sets_of([stream for stream in streams if not why_not(stream, stats, who)]):
        made, told = choose(anatomy, weights, of)
        weights = apply(made, anatomy, weights, torch.float64) if made else weights
        anatomy = transform(made, anatomy)
        moves += made
        notes += [f"{who}: {note}" for note in told]
    return anatomy, moves, notes


def power(mean_C: Tensor, r: float) -> Tensor:
    """s of some channels, in float64: mean^r over the root of its greatest times its least; 1 at r = 0."""
    s_C = mean_C.to(torch.float64).pow(r).clamp_min(FLOOR)
    return s_C / (s_C.max() * s_C.min()).sqrt()


def sets_of(streams: Sequence[Stream]) -> list[list[Stream]]:
    """Streams that take one strength: a norm by itself; all values; all neurons. Norms come last, as their readers'
    rows have moved by then."""
    found: dict[str, list[Stream]] = {}
    for kind in ("value", "ffn", "norm"):
        for stream in streams:
            if stream.kind == kind:
                found.setdefault(stream.name if kind == "norm" else kind, []).append(stream)
    return list(found.values())


def _chosen(
    anatomy: Anatomy, weights: Weights, stats: Statistics, streams: Sequence[Stream], objective: Objective
) -> tuple[list[Move], str]:
    """The moves with the least error, and what to say of them; the least strength of equals."""
    means = {s.name: read(s, stats, "absmean", "smooth-readers").mean(0) for s in streams}
    sites = sorted({port.tensor.removesuffix(".weight") for s in streams for port in s.readers})
    losses = {0.0: objective(weights, sites)}
    tried: dict[float, list[Move]] = {0.0: []}
    for r in POWERS[1:]:
        tried[r] = _moves(streams, means, r)
        losses[r] = objective(apply(tried[r], anatomy, weights, torch.float64), sites)
    best = min(POWERS, key=lambda r: losses[r])
    if best == 0.0:
        return [], f"{', '.join(sites)} read what they read before"
    return tried[best], f"{', '.join(sites)} at power {best}: error {losses[best]:.3g}, was {losses[0.0]:.3g}"


def _moves(streams: Sequence[Stream], means: Mapping[str, Tensor], r: float) -> list[Move]:
    """The scales of streams, those that the same tensor reads taken together."""
    together: dict[str, list[Stream]] = {}
    for stream in streams:
        together.setdefault(stream.readers[0].tensor, []).append(stream)
    moves = []
    for some in together.values():
        s_C = power(torch.cat([means[stream.name] for stream in some]), r)
        parts = torch.split(s_C, [len(means[stream.name]) for stream in some])
        moves += [Move("scale", stream.name, 1 / part) for stream, part in zip(some, parts, strict=True)]
    return moves
