"""The definition of decode attention over packed keys and values, in plain torch. Faster kernels are tested against it.

One query token for each sequence attends to the keys and values that its cache holds packed: rows of channels as
`reference.pack` makes them, with a step for each token and head, or for each of N equal groups of its channels.

Legend: S sequences, H query heads, K key/value heads (K divides H; head h reads h // (H / K)), C tokens that the cache
has room for, D channels of a head, B bytes of a packed row, N groups along a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.reference import pack, unpack


@dataclass(frozen=True, eq=False)
class PackedStates:
    """The keys, or the values, of a cache.

    Attributes:
        packed_SKCB: uint8, rows of codes, lowest bit first.
        scale_SKCN: float, the step of each group of channels; N divides D.
        zero_SKCN: the code that stands for 0, which need not be whole; without it, 2^(bits − 1).
        bits: of a code, 1 to 8.
        channels: D, which the bytes alone do not tell.
    """

    packed_SKCB: Tensor
    scale_SKCN: Tensor
    zero_SKCN: Tensor | None
    bits: int
    channels: int


def encode(states_SKCD: Tensor, bits: int, groups: int = 1, symmetric: bool = False) -> PackedStates:
    """Packs keys or values, each group of channels on its own: from its least to its greatest value, or within ±max|x|.

    Ties go to the even code. A constant group decodes to its constant: the step is then 1 and the zero point takes it.

    Args:
        states_SKCD: any float dtype.
        bits: 1 to 8; 2 to 8 where symmetric, for one bit has no positive code.
        groups: equal groups of channels along a head, each with a step of its own; divides D.
        symmetric: without zero points.
    """
    sequences, heads, room, channels = states_SKCD.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"{groups} groups do not divide {channels} channels")
    if not 1 + symmetric <= bits <= 8:
        raise ValueError(f"codes have {1 + symmetric} to 8 bits, not {bits}")
    x_SKCNG = states_SKCD.float().view(sequences, heads, room, groups, channels // groups)
    top = (1 << bits) - 1
    zero_SKCN = None
    if symmetric:
        half = 1 << (bits - 1)
        step = x_SKCNG.abs().amax(-1) / (half - 1)
        step = torch.where(step > 0, step, 1.0)
        codes = (x_SKCNG / step.unsqueeze(-1)).round() + half
    else:
        least = x_SKCNG.amin(-1)
        step = (x_SKCNG.amax(-1) - least) / top
        step = torch.where(step > 0, step, 1.0)
        zero_SKCN = -least / step
        codes = (x_SKCNG / step.unsqueeze(-1) + zero_SKCN.unsqueeze(-1)).round()
    rows = codes.clamp_(0, top).to(torch.uint8).view(-1, channels)
    packed = pack(rows, bits).view(sequences, heads, room, -1)
    return PackedStates(packed, step, zero_SKCN, bits, channels)


def decode(states: PackedStates) -> Tensor:
    """Keys or values (S, K, C, D), float32: scale · (code − zero)."""
    sequences, heads, room, width = states.packed_SKCB.shape
    groups = states.scale_SKCN.shape[-1]
    codes = unpack(states.packed_SKCB.reshape(-1, width), states.bits, states.channels)
    x_SKCNG = codes.float().view(sequences, heads, room, groups, states.channels // groups)
    zero = float(1 << (states.bits - 1)) if states.zero_SKCN is None else states.zero_SKCN.float().unsqueeze(-1)
    return ((x_SKCNG - zero) * states.scale_SKCN.float().unsqueeze(-1)).view(sequences, heads, room, states.channels)


def decode_attention(
    q_SHD: Tensor, keys: PackedStates, values: PackedStates, lengths_S: Tensor, scaling: float | None = None
) -> Tensor:
    """softmax(scaling · q Kᵀ) V over the first `lengths` tokens of each sequence, in the dtype of `q`; sums in float32.

    A sequence of length 0 gives zeros: it has nothing to attend to.

    Args:
        q_SHD: one token a sequence.
        lengths_S: int32 or int64, at most C.
        scaling: of the scores; 1/√D if not given.
    """
    sequences, heads, channels = q_SHD.shape
    k_SKCD, v_SKCD = decode(keys), decode(values)
    kv_heads, room = k_SKCD.shape[1:3]
    q_SKRD = q_SHD.float().view(sequences, kv_heads, heads // kv_heads, channels)
    score_SKRC = q_SKRD @ k_SKCD.mT * (1 / math.sqrt(channels) if scaling is None else scaling)
    beyond_SC = torch.arange(room, device=q_SHD.device) >= lengths_S.unsqueeze(-1)
    weight_SKRC = score_SKRC.masked_fill(beyond_SC[:, None, None], -math.inf).softmax(-1)
    weight_SKRC = weight_SKRC.masked_fill(beyond_SC[:, None, None], 0.0)  # of length 0 the softmax is 0/0
    v_SKCD = v_SKCD.masked_fill(beyond_SC[:, None, :, None], 0.0)  # room not yet written may hold anything
    return (weight_SKRC @ v_SKCD).view(sequences, heads, v_SKCD.shape[-1]).to(q_SHD.dtype)
