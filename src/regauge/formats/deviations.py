"""Steps by how far weights spread, for grids that are made for weights of deviation 1.

Legend: G groups, K weights in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Grid, Scale, Step
from regauge.formats.laying import middle, stored
from regauge.formats.numbers import LEAST
from regauge.formats.rangers import either, squared_error
from regauge.kernels.cpu.sweep import Range

SEEN = 512
"""Weights of a group that a search looks at, about."""


def some(x_GK: Tensor, run: int) -> Tensor:
    """Whole runs spread over a group, about `SEEN` weights of it; all where it has no more, or no whole runs."""
    groups, size = x_GK.shape
    every = size // SEEN
    if every < 2 or size % run:
        return x_GK
    return x_GK.view(groups, -1, run)[:, ::every].reshape(groups, -1)


@dataclass(frozen=True)
class Deviation:
    """The step with the least squared error of some shares of the group's root mean square.

    For grids that are made for a unit Gaussian, as code books are (NF4's quantiles, trellises): their values lie where
    weights of deviation 1 do, so their ends say nothing of what the step should be. Tried are `tries` shares, evenly
    from 1 − `wide` to 1 + `wide`; with one the root mean square itself. Of long groups some runs speak for all.

    Cost: a rounding of the weights a try, of `SEEN` of them where a group is longer.
    """

    tries: int = 5
    wide: float = 0.16

    def __post_init__(self) -> None:
        if self.tries < 1 or not 0 <= self.wide < 1:
            raise ValueError(f"one share or more, up to less than 1 from 1, not {self.tries} and {self.wide}")

    @property
    def name(self) -> str:
        return "deviation"

    @property
    def kernel(self) -> Range | None:
        return None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        dtype = torch.promote_types(x_GK.dtype, torch.float32)
        raw_G1 = x_GK.to(dtype).square().mean(1, keepdim=True).sqrt_().float().clamp_(min=LEAST)
        scale = scale.bind(raw_G1, grid, 1)
        if self.tries == 1:
            return stored(raw_G1, middle(raw_G1, grid), grid, scale)
        x_GK, weight_GK = some(x_GK, grid.run), None if weight_GK is None else some(weight_GK, grid.run)
        best: Step | None = None
        least_G1 = raw_G1
        for index in range(self.tries):
            share = 1 - self.wide + 2 * self.wide * index / (self.tries - 1)
            step = stored(raw_G1 * share, middle(raw_G1, grid), grid, scale)
            error_G1 = squared_error(x_GK, step, grid, weight_GK)
            if best is None:
                best, least_G1 = step, error_G1
            else:
                wins_G1 = error_G1 < least_G1
                best, least_G1 = either(wins_G1, step, best), torch.where(wins_G1, error_G1, least_G1)
        assert best is not None, "at least one share"
        return best
