"""Decode attention over packed keys and values: `kernels.attention.decode_attention` on a GPU.

One program takes one key/value head of one sequence, all query heads that read it, and one part of the context, which
it walks tile by tile with a running maximum (online softmax, arXiv 1805.02867); a second kernel joins the parts
(split over the context: flash-decoding). Parts share each sequence's own length evenly, so short ones waste nothing.
Weights of tokens are exp(score − maximum) ≤ 1 throughout: nothing overflows, and a part without tokens has weight 0.

Legend: S sequences, H query heads, K key/value heads, R = H / K query heads a key/value head, C room for tokens,
D channels of a head, B bytes in a packed row, N groups along a row; P parts of the context.
"""

from __future__ import annotations

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from regauge.kernels.attention import PackedStates
from regauge.kernels.reference import packed_bytes
from regauge.kernels.triton.launch import FLOATS, check, check_device, compute_dtype, launch, need, processors

TOKENS = 64
"""Tokens of context in a tile; a quarter where steps or products in float32 fill the registers."""
WHOLE = (1, 2, 4, 8)
"""Bits at which no code straddles a byte."""


@triton.jit
@no_type_check
def _states(packed, scale, zero, row, d, known, mask, width, group, groups, BITS: tl.constexpr, ONE: tl.constexpr):
    """Keys or values, float32, of the rows `row` and channels `d`; 0 where `mask` or, by rows alone, `known` is false.

    ONE: one step a row, read once for all its channels.
    """
    byte = tl.load(packed + row * width + d * BITS // 8, mask=mask, other=0).to(tl.int32)
    code = (byte >> (d * BITS % 8)) & ((1 << BITS) - 1)
    at = row if ONE else row * groups + d // group
    held = known if ONE else mask
    origin = 1 << (BITS - 1) if zero is None else tl.load(zero + at, mask=held, other=0.0).to(tl.float32)
    step = tl.load(scale + at, mask=held, other=0.0).to(tl.float32)
    return (code.to(tl.float32) - origin) * step


@triton.jit
@no_type_check
def _attend(
    q,
    k_packed,
    k_scale,
    k_zero,
    k_width,
    k_group,
    k_groups,
    v_packed,
    v_scale,
    v_zero,
    v_width,
    v_group,
    v_groups,
    lengths,
    sums,
    tops,
    totals,
    kv_heads,
    room,
    channels,
    v_channels,
    scaling,
    COMPUTE: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_ONE: tl.constexpr,
    V_ONE: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One part: its sums of values (S, H, P, D), its greatest score and its total of weights (S, H, P), float32.

    `scaling` includes log2 e, so that powers are of 2. ROWS, D, DV: R, channels and v_channels up to a power of two.
    """
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.minimum(tl.load(lengths + sequence).to(tl.int32), room)
    share = tl.cdiv(tl.cdiv(length, PARTS), TILE) * TILE
    first = part * share
    last = tl.minimum(first + share, length)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    dv = tl.arange(0, DV)
    own = sequence.to(tl.int64) * kv_heads + head
    query = own * R + r
    real = r < R
    q_RD = tl.load(q + query[:, None] * channels + d[None, :], mask=real[:, None] & (d < channels)[None, :], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV], tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        row = own * room + token
        held = token < last
        k_mask = (d < channels)[:, None] & held[None, :]
        at, known = row[None, :], held[None, :]
        k_DC = _states(
            k_packed, k_scale, k_zero, at, d[:, None], known, k_mask, k_width, k_group, k_groups, K_BITS, K_ONE
        )
        score = tl.dot(q_RD.to(COMPUTE), k_DC.to(COMPUTE), input_precision="ieee") * scaling
        score = tl.where(held[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        v_mask = held[:, None] & (dv < v_channels)[None, :]
        at, known = row[:, None], held[:, None]
        v_CD = _states(
            v_packed, v_scale, v_zero, at, dv[None, :], known, v_mask, v_width, v_group, v_groups, V_BITS, V_ONE
        )
        acc = acc * shrink[:, None] + tl.dot(weight.to(COMPUTE), v_CD.to(COMPUTE), input_precision="ieee")
        top = higher
    at = query * PARTS + part
    tl.store(tops + at, top, mask=real)
    tl.store(totals + at, total, mask=real)
    tl.store(sums + at[:, None] * v_channels + dv[None, :], acc, mask=real[:, None] & (dv < v_channels)[None, :])


@triton.jit
@no_type_check
def _join(sums, tops, totals, y, v_channels, P: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr):
    """One query head: its parts, each weighed by 2^(its greatest score − the greatest of all)."""
    query = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, P)
    dv = tl.arange(0, DV)
    top = tl.load(tops + query * PARTS + p, mask=p < PARTS, other=float("-inf"))
    highest = tl.maximum(tl.max(top, 0), -1e38)  # finite where no part has a token
    weight = tl.exp2(top - highest)
    total = tl.sum(weight * tl.load(totals + query * PARTS + p, mask=p < PARTS, other=0.0), 0)
    mask = (p < PARTS)[:, None] & (dv < v_channels)[None, :]
    part = tl.load(sums + (query * PARTS + p)[:, None] * v_channels + dv[None, :], mask=mask, other=0.0)
    out = tl.sum(weight[:, None] * part, 0) / tl.where(total > 0, total, 1.0)
    tl.store(y + query * v_channels + dv, out.to(y.dtype.element_ty), mask=dv < v_channels)


def decode_attention(
    q_SHD: Tensor,
    keys: PackedStates,
    values: PackedStates,
    lengths_S: Tensor,
    scaling: float | None = None,
    parts: int = 0,
) -> Tensor:
    """softmax(scaling · q Kᵀ) V over the first `lengths` tokens of each sequence; zeros where there are none.

    Scores and sums are float32; keys and values are multiplied in the dtype of `q`, which the result has.

    Args:
        q_SHD: float16, bfloat16 or float32.
        keys, values: at 1, 2, 4 or 8 bits. Room beyond a sequence's length is not read.
        lengths_S: int32 or int64, at most C; more counts as C.
        scaling: of the scores; 1/√D if not given.
        parts: of the context, taken by different programs; 0 chooses from C.
    """
    check("q", q_SHD, FLOATS, (None, None, None))
    sequences, heads, channels = q_SHD.shape
    need(keys.packed_SKCB.dim() == 4, lambda: f"keys have shape {tuple(keys.packed_SKCB.shape)}; four axes are needed")
    kv_heads, room = keys.packed_SKCB.shape[1:3]
    need(
        kv_heads > 0 and heads % kv_heads == 0,
        lambda: f"{heads} query heads cannot share {kv_heads} key/value heads evenly",
    )
    need(keys.channels == channels, lambda: f"queries have {channels} channels, keys {keys.channels}")
    for name, states in (("keys", keys), ("values", values)):
        _check(name, states, (sequences, kv_heads, room))
    check("lengths", lengths_S, (torch.int32, torch.int64), (sequences,))
    optional = (keys.zero_SKCN, values.zero_SKCN)
    check_device(q_SHD, keys.packed_SKCB, keys.scale_SKCN, values.packed_SKCB, values.scale_SKCN, lengths_S, *optional)
    y: Tensor = torch.ops.regauge_triton.decode_attention(
        *(q_SHD, keys.packed_SKCB, keys.scale_SKCN, keys.zero_SKCN, keys.bits),
        *(values.packed_SKCB, values.scale_SKCN, values.zero_SKCN, values.bits, values.channels),
        *(lengths_S, 1 / math.sqrt(channels) if scaling is None else scaling, parts),
    )
    return y


def _check(name: str, states: PackedStates, before: tuple[int, int, int]) -> None:
    need(states.bits in WHOLE, lambda: f"{name} have {states.bits} bits; decode attention takes 1, 2, 4 or 8")
    width = packed_bytes(states.channels, states.bits)
    check(f"{name}.packed", states.packed_SKCB, (torch.uint8,), (*before, width))
    check(f"{name}.scale", states.scale_SKCN, FLOATS, (*before, None))
    groups = states.scale_SKCN.shape[-1]
    need(
        groups > 0 and states.channels % groups == 0,
        lambda: f"{groups} groups do not divide the {states.channels} channels of {name}",
    )
    if states.zero_SKCN is not None:
        check(f"{name}.zero", states.zero_SKCN, FLOATS, (*before, groups))


@torch.library.custom_op(
    "regauge_triton::decode_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor k_scale, Tensor? k_zero, int k_bits, Tensor v, Tensor v_scale, Tensor? v_zero, "
    "int v_bits, int v_channels, Tensor lengths, float scaling, int parts) -> Tensor",
)
def _decode_op(
    q_SHD: Tensor,
    k_SKCB: Tensor,
    k_scale_SKCN: Tensor,
    k_zero_SKCN: Tensor | None,
    k_bits: int,
    v_SKCB: Tensor,
    v_scale_SKCN: Tensor,
    v_zero_SKCN: Tensor | None,
    v_bits: int,
    v_channels: int,
    lengths_S: Tensor,
    scaling: float,
    parts: int,
) -> Tensor:
    sequences, heads, channels = q_SHD.shape
    kv_heads, room = k_SKCB.shape[1:3]
    y_SHD = q_SHD.new_empty((sequences, heads, v_channels))
    if not y_SHD.numel() or not room:
        return y_SHD.zero_()
    if not parts:  # two programs a multiprocessor, none for less than two tiles
        wanted = triton.cdiv(2 * processors(q_SHD.device), sequences * kv_heads)
        parts = max(1, min(64, wanted, room // (2 * TOKENS)))
    sums = q_SHD.new_empty((sequences, heads, parts, v_channels), dtype=torch.float32)
    tops, totals = sums.new_empty((2, sequences, heads, parts))
    k_groups, v_groups = k_scale_SKCN.shape[-1], v_scale_SKCN.shape[-1]
    tile = TOKENS if k_groups == v_groups == 1 and q_SHD.dtype != torch.float32 else TOKENS // 4
    shared, wide = heads // kv_heads, max(16, triton.next_power_of_2(v_channels))
    launch(
        *(q_SHD.device, _attend, (sequences, kv_heads, parts), q_SHD),
        *(k_SKCB, k_scale_SKCN, k_zero_SKCN, k_SKCB.shape[-1], channels // k_groups, k_groups),
        *(v_SKCB, v_scale_SKCN, v_zero_SKCN, v_SKCB.shape[-1], v_channels // v_groups, v_groups),
        *(lengths_S, sums, tops, totals, kv_heads, room, channels, v_channels, scaling / math.log(2)),
        COMPUTE=compute_dtype(q_SHD.dtype),
        R=shared,
        ROWS=max(16, triton.next_power_of_2(shared)),
        D=max(16, triton.next_power_of_2(channels)),
        DV=wide,
        K_BITS=k_bits,
        V_BITS=v_bits,
        K_ONE=k_groups == 1,
        V_ONE=v_groups == 1,
        TILE=tile,
        PARTS=parts,
        num_stages=2 if tile == TOKENS else 1,
    )
    constants = {"P": triton.next_power_of_2(parts), "PARTS": parts, "DV": wide}
    launch(q_SHD.device, _join, (sequences * heads,), sums, tops, totals, y_SHD, v_channels, **constants)
    return y_SHD


@_decode_op.register_fake
def _(
    q_SHD: Tensor,
    k_SKCB: Tensor,
    k_scale_SKCN: Tensor,
    k_zero_SKCN: Tensor | None,
    k_bits: int,
    v_SKCB: Tensor,
    v_scale_SKCN: Tensor,
    v_zero_SKCN: Tensor | None,
    v_bits: int,
    v_channels: int,
    lengths_S: Tensor,
    scaling: float,
    parts: int,
) -> Tensor:
    return q_SHD.new_empty((*q_SHD.shape[:2], v_channels))
