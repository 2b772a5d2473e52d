"""Permutation: the channels of a stream sorted by importance, so that the prefix is the best part to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move, transform
from regauge.errors import RecipeError
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics, statistic, unseen

STREAMS = ("ffn", "heads", "residual")


@dataclass(frozen=True)
class PermuteByImportance:
    """Channels in order of what they contribute, largest first; the function stays.

    A neuron j of a feed-forward layer, or a group of heads, counts E[x_j²]·‖W_:j‖², the mean square of what the reader
    makes of it (higher = keep). A channel of the residual counts the mean square of the norms' outputs there, summed
    over the model: it is one order for the whole model, so it needs one pass of statistics before streaming begins.
    An expert that no calibration token reached keeps its order, and the notes say so.

    Cost: none at run time. Gains in themselves: outliers gather in a few groups, and a prefix can be cut off.
    Reference: importance sorting of Once-for-All (1908.09791), with the activations' second moment in place of L1.
    """

    streams: str = "ffn"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment", "count"})
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        kinds = self.streams.split("+")
        for kind in kinds:
            if kind not in STREAMS:
                raise RecipeError(f"permute: {kind!r} is no kind of stream to sort ({', '.join(STREAMS)})")
        if "residual" in kinds and len(kinds) > 1:
            raise RecipeError("permute: the residual is sorted once for the model; list it as a rewrite of its own")

    @property
    def scope(self) -> str:
        return "model" if self.streams == "residual" else "block"

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        notes: list[str] = []
        moves: list[Move] = []
        if self.scope == "model":
            moves.append(Move("permute", "residual", _descending(_residual(anatomy, stats))))
        for stream in anatomy.streams:
            if self.scope == "model" or stream.block != block or stream.kind not in self.streams.split("+"):
                continue
            site = stream.readers[0].tensor.removesuffix(".weight")
            if unseen(stats, site):
                notes.append(f"permute: {stream.name} keeps its order: no calibration token reached it")
                continue
            moves.append(Move("permute", stream.name, _descending(_contribution(stream, weights, stats))))
        after = transform(moves, anatomy)
        return (after.with_(notes=(*after.notes, *notes)) if notes else after), moves


def _descending(importance: Tensor) -> Tensor:
    """Indices, most important first; equals keep their order."""
    return torch.argsort(importance, descending=True, stable=True)


def _contribution(stream: Stream, weights: Weights, stats: Statistics) -> Tensor:
    """E[x²]·‖W‖² of each channel, summed over the channels that a head covers."""
    (port,) = stream.readers
    site = port.tensor.removesuffix(".weight")
    moment = statistic(stats, site, "second_moment", "permute").to(torch.float64)
    energy = weights[port.tensor].to(torch.float64).pow(2).sum(0)
    return (moment * energy).view(stream.size, port.width).sum(1)


def _residual(anatomy: Anatomy, stats: Statistics) -> Tensor:
    total = torch.zeros(anatomy.hidden, dtype=torch.float64, device="cpu")
    for stream in anatomy.streams:
        if stream.kind == "norm":
            site = stream.readers[0].tensor.removesuffix(".weight")
            total += statistic(stats, site, "second_moment", "permute").to(torch.float64)
    return total
