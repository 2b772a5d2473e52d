"""What a layer's cache holds, built so that one part of the cache's axes shows."""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.cache.base import Rotary, Seen

B, H, G, T, D = 2, 3, 2, 96, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def positions(batch: int, heads: int, tokens: int, padding: tuple[int, ...] = ()) -> Tensor:
    """Every token in its place, the first ones of each sequence padding."""
    found = torch.arange(tokens).expand(batch, heads, tokens).clone()
    for sequence, count in enumerate(padding):
        found[sequence, :, :count] = -1
    return found


def seen(
    keys: Tensor,
    values: Tensor | None = None,
    queries: Tensor | None = None,
    window: int = 0,
    padding: tuple[int, ...] = (),
    mass: Tensor | None = None,
    rotary: Rotary | None = None,
) -> Seen:
    batch, heads, tokens, size = keys.shape
    return Seen(
        keys,
        draw(*keys.shape, seed=9) if values is None else values,
        positions(batch, heads, tokens, padding),
        torch.zeros(batch, heads, 1, 0, size) if queries is None else queries,
        window,
        size**-0.5,
        mass_BHT=mass,
        rotary=rotary or Rotary(),
    )


def output(queries_BHGQD: Tensor, keys: Tensor, values: Tensor, shown_BHT: Tensor, scale: float) -> Tensor:
    """What attention gives for later queries, from the tokens shown."""
    weight = queries_BHGQD @ keys.unsqueeze(2).mT * scale
    weight = weight.masked_fill(~shown_BHT[:, :, None, None], -torch.inf)
    return weight.softmax(-1) @ values.unsqueeze(2)


def lost(held: Seen, kept_BHO: Tensor, queries_BHGQD: Tensor) -> float:
    """Relative error of the output of later queries when only the kept and the window are shown."""
    shown = torch.cat((kept_BHO, torch.ones_like(held.positions_BHT[:, :, held.older :], dtype=torch.bool)), -1)
    every = torch.ones_like(shown)
    some, whole = (
        output(queries_BHGQD, held.keys_BHTD, held.values_BHTD, mask & (held.positions_BHT >= 0), held.scale)
        for mask in (shown, every)
    )
    return float((some - whole).norm() / whole.norm())
