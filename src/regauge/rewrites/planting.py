"""Planting: a model in a gauge with the outliers of a large one, its function untouched. What methods are tried on.

Small models have tame activations, and a method that takes outliers away has nothing to gain on them. The freedom that
smoothing uses to level channels serves as well to make them unlike: the same moves, the other way.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.anatomy.values import pairs
from regauge.errors import RecipeError
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics
from regauge.rewrites.smoothing import read, why_not

SHARE = 0.01
"""Of a stream's channels that become loud, at least one: LLM.int8() (2208.07339) counts some six of 4,096 to 5,120."""
MILDER = 0.25
"""Of values, neurons and keys, against the norms' outputs."""
LOT, RARE = "lot", "rare"
OFFSET = 0.5
"""Of a loud channel's own size by which it is moved aside."""


@dataclass(frozen=True)
class PlantOutliers:
    """A few channels of every stream made loud, by exact moves; no method that anybody should ship.

    Norm outputs: the same channels in every block, as in large models (2208.07339), written `strength` times as large
    and read by columns as many times smaller; where norm and readers have biases already, those channels are also
    moved aside by half their size, so that their range is asymmetric (Outlier Suppression+, 2304.09145). Values into
    o and the linear branch of a gated unit into down: a quarter as strong. Keys: one rotary pair a head a quarter as
    strong, queries as much weaker. What a stream does not admit stays as it is, and the notes say so.

    Which values and neurons: by lot (as where no token comes), or with `channels: rare` those whose largest magnitude
    stands furthest above their mean on a text. Few tokens excite them, which so become massive there, as the first
    token's activations are in large models (2402.17762), while the rest of the text stays tame. What no exact move can
    plant: a massive channel of the residual itself (its norms admit rotations only, which keep each token's size), and
    a first token unlike what it is: a channel is made loud for all tokens, by as much as each has of it.

    Harder for whatever rounds a token or a tensor with one step (the loud channels take it), and for groups of weights
    (the columns of the loud channels round to nothing). No bias is gained and no head untied: the model stays of its
    architecture. `strength` is taken to the nearest power of two, so that storage in bf16 loses nothing to the scales;
    the gauge of the same seed is the same.

    Cost: none at run time.
    """

    strength: float = 100.0
    seed: int = 0
    channels: str = LOT
    scope: ClassVar[str] = "block"
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        if not 1 <= self.strength <= 2**20:
            raise RecipeError(f"plant-outliers: strength is a number from 1 to {2**20:,}, not {self.strength!r}")
        if self.channels not in (LOT, RARE):
            raise RecipeError(f"plant-outliers: channels are chosen by {LOT!r} or {RARE!r}, not {self.channels!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax", "absmean", "count"}) if self.channels == RARE else frozenset()

    def __call__(
        self,
        anatomy: Anatomy,
        weights: Weights,
        stats: Statistics,
        objective: Objective | None = None,
        block: int | None = None,
    ) -> Moved:
        notes: list[str] = []
        scales: list[Move] = []
        for stream in anatomy.streams:
            if stream.block != block or not stream.writers or stream.kind not in ("norm", "value", "ffn", "qk"):
                continue
            if "scale" in stream.admits:
                scales.append(Move("scale", stream.name, self._scale(stream, anatomy, stats)))
            else:
                notes.append(f"plant-outliers: {stream.kind} streams are left as they are: {stream.stops['scale']}")
        louder = apply(scales, anatomy, weights, torch.float64)
        after = transform(scales, anatomy)
        shifts = [
            Move("shift", move.stream, self._offset(after.stream(move.stream), move.vector(), louder))
            for move in scales
            if _has_biases(after.stream(move.stream), louder)
        ]
        after = transform(shifts, after)
        return after.with_(notes=(*after.notes, *dict.fromkeys(notes))), [*scales, *shifts]

    def _scale(self, stream: Stream, anatomy: Anatomy, stats: Statistics) -> Tensor:
        """Ones, and a power of two where it is loud."""
        factor = _power_of_two(self.strength if stream.kind == "norm" else max(1.0, MILDER * self.strength))
        scale_C = torch.ones(stream.size, dtype=torch.float64, device="cpu")
        if stream.kind != "qk":
            rare = self.channels == RARE and stream.kind != "norm" and not why_not(stream, stats, "plant-outliers")
            scale_C[_rare(stream, stats) if rare else self._loud(stream, stream.size)] = factor
            return scale_C
        first_P, second_P = pairs(anatomy.plumbing)
        if len(first_P):
            pair = self._loud(stream, len(first_P))[:1]
            chosen = torch.cat([first_P[pair], second_P[pair]])
        else:
            chosen = self._loud(stream, stream.size)[:1]
        scale_C[chosen] = 1 / factor  # queries write and keys read
        return scale_C

    def _loud(self, stream: Stream, size: int) -> Tensor:
        """Which channels: of the norms' outputs the same in every block."""
        where = "norm" if stream.kind == "norm" else stream.name
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed} {where} {size}".encode()))
        order = torch.randperm(size, generator=generator, dtype=torch.int64, device="cpu")
        return order[: _few(size)]

    def _offset(self, stream: Stream, scale_C: Tensor, weights: Weights) -> Tensor:
        """Half the size of each loud channel, its sign drawn; 0 elsewhere."""
        gain_C = next(weights[port.tensor] for port in stream.writers if port.tensor.endswith(".gain"))
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed} sign {stream.name}".encode()))
        sign_C = 2.0 * torch.randint(0, 2, (stream.size,), generator=generator, dtype=torch.int64, device="cpu") - 1
        return torch.where(scale_C != 1, OFFSET * sign_C * gain_C.to("cpu", torch.float64).abs(), 0.0)


def _few(size: int) -> int:
    """How many channels of so many become loud."""
    return max(1, round(SHARE * size))


def _rare(stream: Stream, stats: Statistics) -> Tensor:
    """The channels that stand furthest above their own mean somewhere in the text."""
    most_C, mean_C = (read(stream, stats, name, "plant-outliers").amax(0) for name in ("absmax", "absmean"))
    return torch.argsort(most_C / mean_C.clamp_min(1e-30), descending=True, stable=True)[: _few(stream.size)]


def _has_biases(stream: Stream, weights: Weights) -> bool:
    """Whether a shift of a norm's output adds no tensor to the model."""
    if stream.kind != "norm" or "shift" not in stream.admits:
        return False
    writes = any(port.tensor.endswith(".bias") for port in stream.writers)
    return writes and all(f"{port.tensor.removesuffix('.weight')}.bias" in weights for port in stream.readers)


def _power_of_two(value: float) -> float:
    """The nearest, by ratio."""
    return float(2.0 ** round(math.log2(value)))
