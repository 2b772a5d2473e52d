"""The ends of groups of numbers.

Legend: G groups, K weights in a group.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class HasLow(Protocol):
    """What has a least value."""

    @property
    def low(self) -> float: ...


def reach(x_GK: Tensor) -> Tensor:
    """The largest magnitude of each group (G, 1), float32, or float64 of float64."""
    low_G1, high_G1 = ends(x_GK)
    return torch.maximum(-low_G1, high_G1)


def ends(x_GK: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each group (G, 1), float32, or float64 of float64."""
    low_G1, high_G1 = torch.aminmax(x_GK, dim=1, keepdim=True)
    dtype = torch.promote_types(x_GK.dtype, torch.float32)
    return low_G1.to(dtype), high_G1.to(dtype)


def lowest(low_G1: Tensor, scale_G1: Tensor, grid: HasLow) -> Tensor:
    """zero_G1 of a step that keeps the value of the grid's least number, float32."""
    return grid.low - low_G1.float() / scale_G1
