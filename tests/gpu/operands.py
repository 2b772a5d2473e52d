"""Random operands for the kernels, each between poisoned neighbours: a read past an edge shows in the result."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regauge.kernels import reference

PAD = 64
"""Elements of poison on each side."""


def guarded(values: Tensor, device: torch.device) -> Tensor:
    """The same values inside a buffer of NaN, or of the greatest integer."""
    poison = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    buffer = torch.full((values.numel() + 2 * PAD,), poison, dtype=values.dtype, device=device)
    buffer[PAD:-PAD] = values.reshape(-1).to(device)
    return buffer[PAD:-PAD].view(values.shape)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 in low … high − 1, both ends included at least once."""
    drawn = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    if drawn.numel() > 1:
        drawn.view(-1)[0], drawn.view(-1)[-1] = low, high - 1
    return drawn


def packed(bits: int, rows: int, columns: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed rows on the device, and their codes (uint8)."""
    codes_OI = integers(0, 1 << bits, rows, columns, seed=seed).to(torch.uint8)
    return guarded(reference.pack(codes_OI, bits), device), codes_OI


def far(found: Tensor, wanted: Tensor) -> float:
    """Distance relative to what is wanted, in float64; infinite where a NaN was found."""
    gap = ((found.cpu().double() - wanted.double()).norm() / wanted.double().norm()).item()
    return math.inf if math.isnan(gap) else gap
