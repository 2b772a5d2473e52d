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

Pairing = Literal["half", "interleaved"]
"""Which channels make a pair: i and i + C, or 2i and 2i + 1; those behind 2C never turn."""
Table = tuple[Tensor, Tensor]
"""(cosines, sines), (B, T, C), of some positions."""

AT_ONCE = 1 << 17
"""Numbers that turn at once: what stays near the processor."""


def turning(old: Table, new: Table, dtype: torch.dtype) -> Table:
    """What multiplies keys of positions whose tables are `old` so that they stand at those of `new`: z(q) / z(p).

    Args:
        dtype: of the keys; float32 is computed in for those of 16 bits.
    """
    (c, s), (c_new, s_new) = (tuple(part.double() for part in table) for table in (old, new))
    length = c * c + s * s
    wide = _wide(dtype)
    return ((c_new * c + s_new * s) / length).to(wide), ((s_new * c - c_new * s) / length).to(wide)


def turn(keys_BHTD: Tensor, by: Table, pairing: Pairing, out: Tensor | None = None) -> Tensor:
    """Keys at other positions, in their own dtype. What does not turn is copied.

    Args:
        by: of `turning`, for each of the tokens.
        out: where they are written; None: in new memory.
    """
    turned = torch.empty_like(keys_BHTD) if out is None else out
    batch, heads, tokens, size = keys_BHTD.shape
    pairs = by[0].shape[-1]
    cosines, sines = _across(by, pairing)
    if size > 2 * pairs:
        turned[..., 2 * pairs :] = keys_BHTD[..., 2 * pairs :]
    step = max(1, AT_ONCE // (batch * heads * 2 * pairs))
    for start in range(0, tokens, step):
        some = slice(start, start + step)
        new = keys_BHTD[:, :, some, : 2 * pairs].to(cosines.dtype, copy=True)
        other = _partners(new, pairs, pairing)
        # no fused sums: the same key gives the same bits wherever it stands in a piece
        new.mul_(cosines[:, :, some]).add_(other.mul_(sines[:, :, some]))
        turned[:, :, some, : 2 * pairs] = new
    return turned


def _across(by: Table, pairing: Pairing) -> Table:
    """(B, 1, T, 2C): what multiplies each channel, and what multiplies the other one of its pair."""
    cosines, sines = by
    both = (cosines, cosines), (-sines, sines)
    if pairing == "half":
        return tuple(torch.cat(two, -1).unsqueeze(1) for two in both)  # type: ignore[return-value]  # two of them
    return tuple(torch.stack(two, -1).flatten(-2).unsqueeze(1) for two in both)  # type: ignore[return-value]


def _partners(keys_BHTD: Tensor, pairs: int, pairing: Pairing) -> Tensor:
    """The other channel of each pair in every channel's place, in new memory."""
    if pairing == "half":
        return torch.cat((keys_BHTD[..., pairs:], keys_BHTD[..., :pairs]), -1)
    return keys_BHTD.reshape(*keys_BHTD.shape[:-1], pairs, 2).flip(-1).reshape(keys_BHTD.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
