"""Keys at other positions: cached keys carry a rotary embedding, and turn from one position to another without the
states that they came from.

A rotary embedding takes channels of a head in pairs, as complex numbers, and multiplies each pair by the number z(p) =
a·(cos pθ + i·sin pθ) of its position, where `a` is a factor that some rescaled embeddings have. A key at position p
times z(q) / z(p) is the key at q: the factor cancels, and so does whatever rounding the model's own tables have. Tables
come from the model, so nothing here knows of frequencies.

Legend: B sequences (1 where all have the same positions), H KV heads, T tokens, D head size, C pairs that turn.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from regauge.anatomy.values import pair_slices

Pairing = Literal["half", "interleaved"]
"""Which channels make a pair: i and i + C, or 2i and 2i + 1; those behind 2C never turn."""
Table = tuple[Tensor, Tensor]
"""(cosines, sines), (B, T, C), of some positions."""

AT_ONCE = 256
"""Tokens of a head that turn at once: what stays near the processor."""


def turning(old: Table, new: Table, dtype: torch.dtype) -> Table:
    """What multiplies keys of positions whose tables are `old` so that they stand at those of `new`: z(q) / z(p).

    Args:
        dtype: of the keys; float32 is computed in for those of 16 bits.
    """
    (c, s), (c_new, s_new) = (tuple(part.double() for part in table) for table in (old, new))
    length = c * c + s * s
    wide = _wide(dtype)
    return ((c_new * c + s_new * s) / length).to(wide), ((s_new * c - c_new * s) / length).to(wide)


def turn(keys_BHTD: Tensor, by: Table, pairing: Pairing) -> Tensor:
    """Keys at other positions, in new memory and in their own dtype. What does not turn is copied.

    Args:
        by: of `turning`, for each of the tokens.
    """
    turned = torch.empty_like(keys_BHTD)
    cosines, sines = (part.unsqueeze(1) for part in by)
    pairs = cosines.shape[-1]
    one, other = pair_slices(pairs, pairing == "half")
    turned[..., 2 * pairs :] = keys_BHTD[..., 2 * pairs :]
    for start in range(0, keys_BHTD.shape[2], AT_ONCE):
        some = slice(start, start + AT_ONCE)
        c, s = cosines[:, :, some], sines[:, :, some]
        old = keys_BHTD[:, :, some, : 2 * pairs].to(c.dtype)
        new, real, imaginary = torch.empty_like(old), old[..., one], old[..., other]
        # no fused sums: the same key gives the same bits wherever it stands in a piece
        torch.mul(real, c, out=new[..., one]).sub_(imaginary * s)
        torch.mul(imaginary, c, out=new[..., other]).add_(real * s)
        turned[:, :, some, : 2 * pairs] = new
    return turned


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
