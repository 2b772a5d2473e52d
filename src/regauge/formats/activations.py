"""Dynamic quantisation of activations, one step a token, as compressed-tensors does at run time.

Legend: T tokens (any leading dimensions), I channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Grid, ends


@dataclass(frozen=True, eq=False)
class Tokens:
    """Quantised activations: x ≈ scale · (z − zero).

    Attributes:
        z_TI: grid values, float32.
        scale_T1: float32, positive.
        zero_T1: None on symmetric grids.
    """

    z_TI: Tensor
    scale_T1: Tensor
    zero_T1: Tensor | None

    def decode(self) -> Tensor:
        """float32, in the shape of the activations."""
        z_TI = self.z_TI if self.zero_T1 is None else self.z_TI - self.zero_T1
        return z_TI * self.scale_T1


def quantise(x_TI: Tensor, grid: Grid) -> Tokens:
    """Each token over its own range: [−a, a] on symmetric grids, else [min, max] widened to hold 0.

    Works in float32 whatever the dtype of `x_TI`. A token of zeros, or one too small for a float32 step, gets the least
    positive step. Differs: compressed-tensors works in the dtype of the activations, so in bf16 its steps and quotients
    are rounded to bf16; in float32 the two agree to the bit (asymmetric: but for quotients that lie on a tie).
    """
    x = x_TI.float()
    low_T1, high_T1 = (end.view(*x.shape[:-1], 1) for end in ends(x.reshape(-1, x.shape[-1])))
    least = torch.finfo(torch.float32).eps * torch.finfo(torch.float32).tiny ** 0.5
    if grid.symmetric:
        reach_T1 = torch.maximum(-low_T1, high_T1)
        scale_T1 = (reach_T1 / ((grid.high - grid.low) / 2)).clamp_(min=least)
        return Tokens(grid.snap(x / scale_T1), scale_T1, None)
    low_T1, high_T1, width = low_T1.clamp(max=0), high_T1.clamp(min=0), grid.high - grid.low
    scale_T1 = ((high_T1 - low_T1) / width).clamp_(min=least)
    zero_T1 = (grid.low - low_T1 / scale_T1).round_().clamp_(grid.low, grid.high)
    return Tokens(grid.snap(x / scale_T1 + zero_T1), scale_T1, zero_T1)


def simulate(x_TI: Tensor, grid: Grid) -> Tensor:
    """`x_TI` as it comes back from its codes, same shape and dtype."""
    return quantise(x_TI, grid).decode().to(x_TI.dtype)
