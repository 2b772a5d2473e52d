"""Steps whose value of code 0 is a number of its own, not a point of the grid: what caches are rounded with.

Legend: G groups, K numbers in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import LOW, Grid, Scale, Step, ends, lowest
from regauge.formats.numbers import said
from regauge.kernels.cpu import sweep


@dataclass(frozen=True)
class Ends:
    """The range [min, max] of the group, wherever it lies: step = (max - min) / (2^b - 1), and min is code 0's value,
    kept in the dtype of the step (KIVI, arXiv 2402.02750). On symmetric grids and floats [-a, a], a the largest
    magnitude.

    A range that need not hold 0 is what channels with a large bias want: their numbers lie far from it, close together.
    Works in float32 with the step and the low as they are stored; what is not finite stays so in the low. A group of
    one value has step 1 and that value.

    Cost: two passes over the values.
    """

    @property
    def name(self) -> str:
        return "ends"

    @property
    def kernel(self) -> sweep.Range | None:
        return None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        low_G1, high_G1 = ends(x_GK)
        low_G1, high_G1 = low_G1.float(), high_G1.float()
        if grid.symmetric:
            raw_G1 = said(torch.maximum(-low_G1, high_G1) / ((grid.high - grid.low) / 2), grid)
            scale_G1, fields = scale.bind(raw_G1, grid, 1).store(raw_G1)
            return Step(scale_G1, None, fields)
        width = grid.high - grid.low
        raw_G1 = high_G1 / width - low_G1 / width
        scale_G1, fields = scale.bind(raw_G1, grid, 1).store(raw_G1)
        kept = fields["scale"].dtype
        kept = kept if kept.is_floating_point else torch.bfloat16  # a step of one byte
        limits = torch.finfo(kept)
        stored_G1 = low_G1.clamp(limits.min, limits.max).to(kept)
        fields = {**fields, LOW: stored_G1}
        return Step(scale_G1, lowest(stored_G1, scale_G1, grid), fields)
