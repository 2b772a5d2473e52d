"""A range laid over a grid: the step and zero point of [low, high], as the scale keeps them.

Legend: G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.formats.base import Grid, Low, Scale, Step, lowest
from regauge.formats.numbers import said


def stored(raw_G1: Tensor, zero_G1: Tensor | None, grid: Grid, scale: Scale) -> Step:
    """The step as the scale keeps it, with its zero point."""
    if zero_G1 is not None and scale.low is not None:
        return placed(raw_G1, (grid.low - zero_G1) * raw_G1, grid, scale, scale.low)
    scale_G1, fields = scale.store(raw_G1)
    if zero_G1 is not None:
        fields = {**fields, "zero": grid.encode(zero_G1)}
    return Step(scale_G1, zero_G1, fields)


def placed(raw_G1: Tensor, low_G1: Tensor, grid: Grid, scale: Scale, keeps: Low) -> Step:
    """The step of a scale that keeps the value of the least number, which is `low_G1`."""
    scale_G1, fields = scale.store(raw_G1)
    kept_G1, beside = keeps.store(low_G1)
    return Step(scale_G1, lowest(kept_G1, scale_G1, grid), {**fields, **beside})


def middle(raw_G1: Tensor, grid: Grid) -> Tensor | None:
    """The zero point of a range that lies evenly around 0."""
    if grid.symmetric:
        return None
    return torch.full_like(raw_G1, float(int(grid.high - grid.low + 1) // 2), dtype=torch.float32)


def over(x: Tensor, number: float) -> Tensor:
    """x / number, rounded alike on every device: on a GPU torch multiplies by the reciprocal of a plain number."""
    return x / torch.full_like(x, number) if x.is_cuda else x / number


def even(reach_G1: Tensor, grid: Grid) -> Tensor:
    """Raw step of the range [−a, a]: 2a over the width of the grid, which of one-sided numbers counts twice; above 0
    where the grid has no 0."""
    low = min(grid.low, -grid.high) if grid.symmetric else grid.low
    return said(over(reach_G1, (grid.high - low) / 2), grid)


def uneven(low_G1: Tensor, high_G1: Tensor, grid: Grid, scale: Scale) -> Step:
    """The step of the range [low, high], which must hold 0."""
    if grid.symmetric:
        raw_G1 = torch.maximum(over(low_G1, grid.low), over(high_G1, grid.high))
        return stored(said(raw_G1, grid), None, grid, scale)
    width = grid.high - grid.low
    raw_G1 = high_G1 / width - low_G1 / width
    if scale.low is not None:
        return placed(raw_G1, low_G1, grid, scale, scale.low)
    scale_G1, fields = scale.store(raw_G1)
    zero_G1 = (grid.low - low_G1 / scale_G1).round().clamp(grid.low, grid.high).float()
    return Step(scale_G1, zero_G1, {**fields, "zero": grid.encode(zero_G1)})
