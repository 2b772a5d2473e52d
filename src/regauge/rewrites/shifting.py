"""Shift and scale: channels moved to the middle of their range, then those beyond a threshold brought down to it.

y′ = (y − z) / s with z_j = (max Y_j + min Y_j) / 2 and s_j = max(1, max|Y_j − z_j| / t) (Outlier Suppression+,
2304.09145, section 3). The shift takes asymmetry between channels away, which no scale can; the threshold t leaves tame
channels alone, where smoothing would move every one. Writers take both (gain / s, (bias − z) / s), readers W diag(s)
and the bias b + W z. Legend: C channels of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.errors import RecipeError
from regauge.formats.base import OBJECTIVE
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics
from regauge.rewrites.reading import by_sets
from regauge.rewrites.smoothing import kinds_of, read

STEPS = 20
"""Thresholds that are tried."""
TAME = 0.1
"""The share of channels that are scaled by none of them."""
SHIFTED = ("norm", "value")
"""Kinds of streams that admit a shift: what attention adds up of shifted values is shifted by as much."""


@dataclass(frozen=True)
class GainBiases:
    """Biases of zeros where a shift would need one: norms and what reads them, values and o.

    By itself it changes nothing; it makes room for `shift-scale` in models without biases (llama). Stock loaders of
    such an architecture have no place for them, so the artifact is one that this library loads.

    Cost: an addition a matrix and a norm.
    """

    scope: ClassVar[str] = "model"
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
        here = [stream for stream in anatomy.streams if stream.block is not None and stream.kind in SHIFTED]
        notes = [f"gain-biases: {s.kind} streams gain none: {s.stops['shift']}" for s in here if "shift" in s.stops]
        moves = [
            Move("shift", stream.name, torch.zeros(stream.size, dtype=torch.float64, device="cpu"))
            for stream in here
            if "shift" in stream.admits and not shiftable(stream, anatomy)
        ]
        after = transform(moves, anatomy)
        return after.with_(notes=(*after.notes, *dict.fromkeys(notes))), moves


@dataclass(frozen=True)
class ShiftScale:
    """Outlier Suppression+ (2304.09145): shift and scale, the threshold by what its readers lose.

    Of `STEPS` thresholds for each set of readers (q, k and v; o; gate and up; down), from the largest magnitude down to
    that of the tamest tenth of channels, the one with which rounding these readers' weights and inputs, as the plan
    says, changes the block's output least; leaving all as it is counts too. Streams shift where writer and readers have
    biases (see `gain-biases`); the others are scaled, and the notes say so.

    Where we differ: the error is that of the block's output, for q, k and v as for all (the paper's is behind attention
    for those, on the linear output for the others); thresholds are spaced by ratio and twenty, not evenly and a hundred
    or more; values shift too. A step that is known beforehand is stood in for by each batch's own range.

    Cost: one pass of calibration for the ranges, and 21 runs of a block for each of up to four sets; none at run time
    where biases are there already.
    """

    streams: str = "norm+value+ffn"
    shift: bool = True
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"minimum", "maximum", "count", OBJECTIVE})
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        kinds_of(self.streams, "shift-scale")

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        who = "shift-scale"
        if objective is None:
            raise RecipeError(f"{who}: thresholds are chosen by a block's error, and nothing gives it here")
        kinds = kinds_of(self.streams, who)
        here = [s for s in anatomy.streams if s.block == block and s.kind in kinds]

        def choose(anatomy: Anatomy, weights: Weights, of: Sequence[Stream]) -> tuple[list[Move], list[str]]:
            ranges = {s.name: centred(s, anatomy, stats, self.shift, who) for s in of}
            notes = [unshifted(s) for s in of if self.shift and s.kind in SHIFTED and not shiftable(s, anatomy)]
            made, note = _chosen(anatomy, weights, of, ranges, objective)
            return made, [*notes, note]

        after, moves, notes = by_sets((anatomy, weights), here, stats, who, choose)
        return after.with_(notes=(*after.notes, *dict.fromkeys(notes))), moves


def shiftable(stream: Stream, anatomy: Anatomy) -> bool:
    """Whether a shift of the stream adds no tensor to the model."""
    if stream.kind not in SHIFTED or "shift" not in stream.admits:
        return False
    biased = {site.name for site in anatomy.sites if site.bias is not None}
    writes = any(port.tensor.endswith(".bias") for port in stream.writers)
    return writes and all(port.tensor.removesuffix(".weight") in biased for port in stream.readers)


def centred(stream: Stream, anatomy: Anatomy, stats: Statistics, shift: bool, who: str) -> tuple[Tensor, Tensor]:
    """(z, max|Y − z|) of each channel, float64; z is 0 where a shift would add a tensor, or none is wanted."""
    low_C = read(stream, stats, "minimum", who).amin(0).to(torch.float64)
    high_C = read(stream, stats, "maximum", who).amax(0).to(torch.float64)
    z_C = (high_C + low_C) / 2 if shift and shiftable(stream, anatomy) else torch.zeros_like(low_C)
    return z_C, torch.maximum(high_C - z_C, z_C - low_C)


def unshifted(stream: Stream) -> str:
    """What is said of a stream that is not shifted."""
    return f"{stream.kind} streams are scaled and not shifted: there are no biases; `gain-biases` adds them"


def scale_of(most_C: Tensor, threshold: float) -> Tensor:
    """s_j = max(1, max|Y_j − z_j| / t)."""
    return (most_C / threshold).clamp_min(1.0)


def thresholds(most_C: Tensor) -> list[float]:
    """From the largest magnitude, which scales nothing, down to that of the tamest tenth, evenly by ratio."""
    live_C = most_C[most_C > 0]
    if not len(live_C):
        return []
    top, low = float(live_C.max()), float(torch.quantile(live_C, TAME))
    return [top * (low / top) ** (i / (STEPS - 1)) for i in range(STEPS)]


def _chosen(
    anatomy: Anatomy,
    weights: Weights,
    streams: Sequence[Stream],
    ranges: Mapping[str, tuple[Tensor, Tensor]],
    objective: Objective,
) -> tuple[list[Move], str]:
    """The moves with the least error, and what to say of them."""
    sites = sorted({port.tensor.removesuffix(".weight") for s in streams for port in s.readers})
    best, least, told = list[Move](), objective(weights, sites), ""
    before = least
    for threshold in thresholds(torch.cat([ranges[s.name][1] for s in streams])):
        tried = [move for s in streams for move in _moves(s.name, *ranges[s.name], threshold)]
        loss = objective(apply(tried, anatomy, weights, torch.float64), sites) if tried else before
        if loss < least:
            best, least, told = tried, loss, f"threshold {threshold:.3g}: error {loss:.3g}, was {before:.3g}"
    return best, f"{', '.join(sites)} {'at ' + told if best else 'read what they read before'}"


def _moves(name: str, z_C: Tensor, most_C: Tensor, threshold: float) -> list[Move]:
    """y′ = (y − z) / s."""
    moves, s_C = [], scale_of(most_C, threshold)
    if bool(z_C.any()):
        moves.append(Move("shift", name, -z_C))
    if bool((s_C != 1).any()):
        moves.append(Move("scale", name, 1 / s_C))
    return moves
