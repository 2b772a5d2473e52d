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


@runtime_checkable
class HasValues(Protocol):
    """What knows its values."""

    @property
    def kind(self) -> str: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def table(self) -> Tensor: ...


LEAST = 2.0**-100
"""The step of a group of zeros on a grid without 0, before it is stored: 0 itself would be stored as 1."""


def zeroless(grid: HasValues) -> bool:
    """Whether nothing on the grid decodes to 0, as file formats have it."""
    return grid.kind == "table" and grid.symmetric and not bool((grid.table == 0).any())


def said(raw_G1: Tensor, grid: HasValues) -> Tensor:
    """Raw steps, that of a group of zeros `LEAST` where the grid has no 0 to make zeros of any step."""
    return torch.where(raw_G1 == 0, LEAST, raw_G1) if zeroless(grid) else raw_G1


def lowest(low_G1: Tensor, scale_G1: Tensor, grid: HasLow) -> Tensor:
    """zero_G1 of a step that keeps the value of the grid's least number, float32."""
    return grid.low - low_G1.float() / scale_G1
