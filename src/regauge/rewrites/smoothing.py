"""Smoothing: a scale per channel moves outliers from a layer's input into its weights, where they quantise better.

s_j = max|X_j|^α / max|W_j|^(1−α) (SmoothQuant, 2211.10438, equation 4): the input is divided by s, the weight column
multiplied. α = 1 levels the inputs, α = 0 the weights. Every reader of a stream shares its s, so max|W_j| runs over all
of them (q, k and v; every expert and the router), and under grouped queries one s serves all heads of a KV group.

Where we differ: s is divided by its geometric mean, over the channels that one tensor reads. It changes neither codes
nor errors, since the step of a quantiser takes the factor up, and keeps storage in 16 bits away from its limits.
Channels that are zero in X or in every W keep s = 1.
Cost: one pass of calibration for max|X_j|; nothing at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Port, Stream, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.errors import RecipeError
from regauge.formats.base import OBJECTIVE
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics, statistic, unseen

GRID = tuple(round(0.05 * i, 2) for i in range(21))
"""α = 0, 0.05, …, 1, as SmoothQuant+ searches it."""

BY_BLOCK = "block"
STREAMS = ("norm", "value", "ffn")
FLOOR = 1e-5  # of max|X| and max|W| against the largest of the stream, so that no scale explodes


@dataclass(frozen=True)
class SmoothNorms:
    """SmoothQuant (2211.10438): the norms in front of attention and feed-forward, with one α given by hand.

    α = 0.5 suits most models, 0.75 and above those with stronger outliers (the paper's OPT, BLOOM and GLM settings).
    """

    alpha: float = 0.5
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        return _smooth(anatomy, weights, stats, block, self.alpha, ("norm",), "smooth-norms")


@dataclass(frozen=True)
class SmoothStreams:
    """SmoothQuant+ (2312.03788): every scalable stream, with one α found by the loss of the whole model.

    Streams: norm outputs; values into o, one scale per channel of a KV group; the linear branch of a gated unit (or
    ReLU's positive scales) into down. α is searched over 0, 0.05, …, 1 by the engine (see `rewrites/base.py`) with the
    model quantised as the plan says, so errors that add up across layers count. Give a number to skip the search.

    Where we differ: the authors' released code smooths behind norms only, and which other linears the paper smooths we
    could not check; this smooths them all. Set `streams: norm` for the released form.
    """

    alpha: float | str = "search"
    streams: str = "norm+value+ffn"
    scope: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str) and self.alpha not in ("search", BY_BLOCK):
            raise RecipeError(f"smooth-streams: alpha is a number, 'search' or '{BY_BLOCK}', not {self.alpha!r}")
        kinds_of(self.streams, "smooth-streams")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax", "count"} | ({OBJECTIVE} if self.alpha == BY_BLOCK else set()))

    @property
    def search(self) -> Mapping[str, tuple[float, ...]]:
        return {"alpha": GRID} if self.alpha == "search" else NOTHING

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        if self.search:
            raise RecipeError("smooth-streams: alpha is still to be searched; the engine sets it before it calls")
        who = "smooth-streams"
        kinds = kinds_of(self.streams, who)
        if self.alpha != BY_BLOCK:
            return _smooth(anatomy, weights, stats, block, float(self.alpha), kinds, who)
        if objective is None:
            raise RecipeError(f"{who}: alpha '{BY_BLOCK}' is chosen by a block's error, and nothing gives it here")
        tried = {alpha: _smooth(anatomy, weights, stats, block, alpha, kinds, who) for alpha in GRID}
        losses = {
            alpha: objective(apply(moves, anatomy, weights, torch.float64)) for alpha, (_, moves) in tried.items()
        }
        best = min(GRID, key=lambda alpha: losses[alpha])
        after, moves = tried[best]
        note = f"{who}: alpha {best} in block {block}, whose error it leaves at {losses[best]:.3g}"
        return after.with_(notes=(*after.notes, note)), moves


def strength(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^α / max|W_j|^(1−α), in float64; 1 where a channel is dead."""
    x, w = x_absmax.to(torch.float64), w_absmax.to(torch.float64)
    live = (x > 0) & (w > 0)
    if not bool(live.any()):
        return torch.ones_like(x)
    x, w = x.clamp_min(FLOOR * float(x.max())), w.clamp_min(FLOOR * float(w.max()))
    return torch.where(live, x.pow(alpha) / w.pow(1 - alpha), torch.ones_like(x))


def _smooth(
    anatomy: Anatomy,
    weights: Weights,
    stats: Statistics,
    block: int | None,
    alpha: float,
    kinds: Sequence[str],
    who: str,
) -> Moved:
    """Moves of one block. Values and neurons come first: they scale rows of matrices whose columns a norm then sees.

    (The other order, norms first, lost a tenth to a quarter more at the best α on models with planted outliers.)
    """
    notes: list[str] = []
    moves: list[Move] = []
    for round_ in (("value", "ffn"), ("norm",)):
        here = [s for s in anatomy.streams if s.block == block and s.kind in round_ and s.kind in kinds]
        notes += [note for stream in here if (note := why_not(stream, stats, who))]
        found = [stream for stream in here if not why_not(stream, stats, who)]
        scales = {s.name: strength(read(s, stats, "absmax", who).amax(0), columns(s, weights), alpha) for s in found}
        readers = {stream.name: stream.readers[0].tensor for stream in found}
        made = levelled(scales, readers)
        weights = apply(made, anatomy, weights, torch.float64)
        anatomy = transform(made, anatomy)
        moves += made
    return (anatomy.with_(notes=(*anatomy.notes, *notes)) if notes else anatomy), moves


def kinds_of(streams: str, who: str) -> list[str]:
    """`norm+value` → the kinds of streams that are smoothed.

    Raises:
        RecipeError: one is no kind of stream to smooth.
    """
    kinds = streams.split("+")
    for kind in kinds:
        if kind not in STREAMS:
            raise RecipeError(f"{who}: {kind!r} is no kind of stream to smooth ({', '.join(STREAMS)})")
    return kinds


def why_not(stream: Stream, stats: Statistics, who: str) -> str:
    """Why a stream is left alone, or "". Stops have the same words for every block, so a receipt holds them once."""
    stop = stream.stops.get("scale", "")
    if stop:
        return f"{who}: {stream.kind} streams are left as they are: {stop}"
    sites = {port.tensor.removesuffix(".weight") for port in stream.readers}
    if all(unseen(stats, site) for site in sites):
        return f"{who}: {stream.name} is left as it is: no calibration token reached it"
    return ""


def levelled(scales: Mapping[str, Tensor], readers: Mapping[str, str]) -> list[Move]:
    """y′ = y / s, each s by the geometric mean of those that the same tensor reads."""
    return [Move("scale", name, _mean(scales, readers, name) / s) for name, s in scales.items()]


def _mean(scales: Mapping[str, Tensor], readers: Mapping[str, str], name: str) -> Tensor:
    """Geometric mean of the scales of all streams that the same tensor reads."""
    together = [s for other, s in scales.items() if readers[other] == readers[name]]
    return torch.cat(together).log().mean().exp()


def read(stream: Stream, stats: Statistics, name: str, who: str) -> Tensor:
    """A statistic of a stream's channels at every port that reads it and that a token reached, (ports, channels)."""
    found = []
    for port in stream.readers:
        site = port.tensor.removesuffix(".weight")
        if not unseen(stats, site):
            found.append(statistic(stats, site, name, who)[port.start : port.start + stream.size])
    return torch.stack(found)


def columns(stream: Stream, weights: Weights) -> Tensor:
    """max|W_j| of a stream's channels over every port that reads it."""

    def column(port: Port) -> Tensor:
        return weights[port.tensor].narrow(1, port.start, stream.size).abs().amax(0)

    return torch.stack([column(port).to(torch.float64) for port in stream.readers]).amax(0)
