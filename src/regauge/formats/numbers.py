"""Groups of numbers: their ends, and how many are worked on at a time.

Legend: G groups, K weights in a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements worked on at a time, so that a few float32 temporaries stay in a core's second-level cache."""


def chunks(x_GK: Tensor) -> Iterator[slice]:
    """Slices of whole groups of about `CHUNK` elements."""
    groups, size = x_GK.shape
    step = max(1, CHUNK // max(size, 1))
    return (slice(start, start + step) for start in range(0, groups, step))


def reach(x_GK: Tensor) -> Tensor:
    """The largest magnitude of each group (G, 1), float32, or float64 of float64."""
    low_G1, high_G1 = ends(x_GK)
    return torch.maximum(-low_G1, high_G1)


def ends(x_GK: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each group (G, 1), float32, or float64 of float64."""
    low_G1, high_G1 = torch.aminmax(x_GK, dim=1, keepdim=True)
    dtype = torch.promote_types(x_GK.dtype, torch.float32)
    return low_G1.to(dtype), high_G1.to(dtype)
