"""The definition of decode attention over packed keys and values, in plain torch. Faster kernels are tested against it.

One query token for each sequence attends to the keys and values that its cache holds packed: rows of channels as
`reference.pack` makes them, with a step for each token and head, or for each of N equal groups of its channels. What
makes codes of them is a format (`formats.states`).

Legend: S sequences, H query heads, K key/value heads (K divides H; head h reads h // (H / K)), C tokens that the cache
has room for, D channels of a head, B bytes of a packed row, N groups along a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.reference import unpack


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
