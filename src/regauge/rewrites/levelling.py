"""Levelling: a norm's output moved so that one step for all its channels gives the codes that a step each would have.

q = clamp(round(x / s) + z) with a step s and a zero z a channel; s̃ = mean s, z̃ = round(mean z), r₁ = s / s̃, r₂ = z − z̃:
of x′ = (x + s r₂) / r₁ the codes with s̃ and z̃ are the same integers, as r₂ is whole (RepQuant, 2402.05628; RepQ-ViT,
2212.08254). Writers take it as gain / r₁ and (bias + s r₂) / r₁, readers as W diag(r₁) and b − W (s r₂).
Legend: C channels of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, transform
from regauge.errors import RecipeError
from regauge.rewrites.base import NOTHING, Moved, Objective, Statistics
from regauge.rewrites.shifting import shiftable, unshifted
from regauge.rewrites.smoothing import read, why_not

NARROW = 1e-3
"""Of the mean step, below which no channel's step is taken: one that hardly moves would be blown up."""


@dataclass(frozen=True)
class Level:
    """RepQuant's norms (2402.05628): what steps a channel would give, read by one step a tensor.

    Meant beside a static reading of `bits` bits, asymmetric, one step a tensor: what calibration then sees has s̃ and z̃
    as its range. Where norm and readers have no biases nothing can be shifted: channels are scaled to one magnitude and
    the notes say so (`gain-biases` adds some).

    Where we differ: ranges are least to greatest (the paper tries percentiles); nothing is learnt (its clipping and its
    reconstruction of weights are `learnt-clip` and the rounders). Its softmax is a reading of attention's probabilities
    on `log-sqrt2`, and no part of this.

    Cost: one pass over calibration text; none at run time where biases are there already.
    """

    bits: int = 8
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"minimum", "maximum", "count"})
    search: ClassVar[Mapping[str, tuple[float, ...]]] = NOTHING

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"level: inputs have 2 to 8 bits, not {self.bits}")

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
        for stream in anatomy.streams:
            if stream.block != block or stream.kind != "norm":
                continue
            if note := why_not(stream, stats, "level"):
                notes.append(note)
                continue
            low_C = read(stream, stats, "minimum", "level").amin(0).to(torch.float64)
            high_C = read(stream, stats, "maximum", "level").amax(0).to(torch.float64)
            if not shiftable(stream, anatomy):
                notes.append(f"level: {unshifted(stream)}")
                high_C = torch.maximum(-low_C, high_C)
                low_C = -high_C
            shift_C, scale_C = moved(low_C, high_C, self.bits)
            if bool(shift_C.any()) and shiftable(stream, anatomy):
                moves.append(Move("shift", stream.name, shift_C))
            moves.append(Move("scale", stream.name, scale_C))
        after = transform(moves, anatomy)
        return after.with_(notes=(*after.notes, *dict.fromkeys(notes))), moves


def steps(low_C: Tensor, high_C: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(s, z) of each channel: its range over the codes, and the whole number that stands for 0."""
    s_C = (high_C - low_C) / ((1 << bits) - 1)
    mean = float(s_C.mean())
    s_C = s_C.clamp_min(NARROW * mean if mean > 0 else 1.0)
    return s_C, (-low_C / s_C).round()


def moved(low_C: Tensor, high_C: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(c, m) of x′ = (x + c) m: s r₂ and 1 / r₁."""
    s_C, z_C = steps(low_C, high_C, bits)
    return s_C * (z_C - z_C.mean().round()), s_C.mean() / s_C
