"""Attention over packed parts of a cache on a GPU: the parts of `kernels.attention.attend`, joined with the window.

One program takes one KV head of one sequence, all queries that read it, and one stretch of the head's tokens, which it
walks tile by tile with a running maximum (online softmax, 1805.02867); what stretches, parts and window come to is
joined by their greatest scores (split along time: flash-decoding). Codes are read where they lie (`kernels.blocks`): a
code's byte and shift are arithmetic of its token and channel.

Legend: B sequences, Q new tokens, H query heads, K KV heads, R = Q · H / K queries of one, D channels of keys, E of
values; P stretches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from regauge.kernels.attention import Part, Window
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.triton.launch import compute_dtype, launch, need, processors

LEAST, MOST = 16, 64
"""Tokens of a tile: the least that a product takes, which divides every block; the most that registers bear."""
PROGRAMS = 16
"""Stretches for each multiprocessor: enough that reading never waits for one of them."""
WARPS = 2
BITS = (1, 2, 3, 4, 8, 16)
"""Of codes, and of rows, that the kernel reads."""


@triton.jit
@no_type_check
def _codes(base, lane, depth, mask, RUNS: tl.constexpr, BITS: tl.constexpr):
    """Codes, int32: `lane` and `depth` are token and channel of keys, channel and token of values."""
    PIECES: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else (4 if BITS == 2 else 8))
    BYTES: tl.constexpr = 3 if BITS == 3 else 1
    piece = depth // 4 % PIECES
    first = base + ((lane // 16) * RUNS + depth // (4 * PIECES)) * (64 * BYTES) + lane % 16 * 4 + depth % 4
    if BITS == 3:
        split = piece >= 6
        place = tl.where(split, piece - 6, piece // 2)
        word = tl.load(first + place * 64, mask=mask, other=0).to(tl.int32)
        top = tl.load(first + 128, mask=mask & split, other=0).to(tl.int32)
        high = ((word >> 6) & 3) | (((top >> piece) & 1) << 2)
        code = tl.where(split, high, (word >> (piece % 2 * 3)) & 7)
    else:
        word = tl.load(first, mask=mask, other=0).to(tl.int32)
        code = (word >> (piece * BITS)) & ((1 << BITS) - 1)
    return code


@triton.jit
@no_type_check
def _read(
    block, token, channel, held, real, alone, offset, group, STEP, CHANNELS: tl.constexpr, BITS: tl.constexpr,
    KEYS: tl.constexpr, TIME: tl.constexpr, SIDE: tl.constexpr, STEPS: tl.constexpr, LOW: tl.constexpr,
    RUNS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Keys or values, float32, of tokens of a block: `token` and `channel` broadcast against each other.

    Args:
        block: pointers to the bytes of the block of each token. STEP: a pointer of the dtype of steps, or of rows.
        held, real: which tokens, which channels there are.
        alone: (pointer to the block, token) of the first token, (1, 1) each.
        SIDE: steps side by side in a group; STEPS: bytes of all steps.
        FLAT: steps are the same for all tokens of the tile (TIME), or for all channels: read once, not once a number.
    """
    mask = held & real
    if BITS == 16:
        found = tl.load(block.to(STEP.dtype) + (token * CHANNELS + channel), mask=mask, other=0.0).to(tl.float32)
    else:
        if FLAT and TIME:
            steps, at, known = alone[0], (alone[1] // group) * SIDE + channel, real
        elif FLAT:
            steps, at, known = block, token, held
        else:
            steps, known = block, mask
            at = (token // group) * SIDE + channel if TIME else (channel // group) * SIDE + token
        step = tl.load(steps.to(STEP.dtype) + at, mask=known, other=0.0).to(tl.float32)
        base = block + STEPS * (1 + LOW)
        lane, depth = (token, channel) if KEYS else (channel, token)
        found = (_codes(base, lane, depth, mask, RUNS, BITS).to(tl.float32) - offset) * step
        if LOW:
            found += tl.load((steps + STEPS).to(STEP.dtype) + at, mask=known, other=0.0).to(tl.float32)
    return found


@triton.jit
@no_type_check
def _attend(
    q, k_blocks, k_offsets, k_like, k_offset, k_group, v_blocks, v_offsets, v_like, v_offset, v_group,
    lengths, firsts, k_rows, v_rows, row_offsets, sums, tops, totals, queries, scaling, softcap,
    COMPUTE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    K_CHANNELS: tl.constexpr, V_CHANNELS: tl.constexpr, TOKENS: tl.constexpr, K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_TIME: tl.constexpr, V_TIME: tl.constexpr,
    K_SIDE: tl.constexpr, V_SIDE: tl.constexpr, K_STEPS: tl.constexpr, V_STEPS: tl.constexpr, K_LOW: tl.constexpr,
    V_LOW: tl.constexpr, K_RUNS: tl.constexpr, V_RUNS: tl.constexpr, K_FLAT: tl.constexpr, V_FLAT: tl.constexpr,
    CAPPED: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One stretch: its sums of values (B K, R, P, E), its greatest score and its total of weights (B K, R, P)."""
    own, stretch = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + own)
    share = tl.cdiv(tl.cdiv(length, TILE), P) * TILE
    start = stretch * share
    stop = tl.minimum(start + share, length)
    first = tl.load(firsts + own) if firsts is not None else 0
    keys = k_blocks + tl.load(k_offsets + own)
    values = v_blocks + tl.load(v_offsets + own)
    r, d, e = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, E)
    real = r < queries
    query = own.to(tl.int64) * queries + r
    asked = real[:, None] & (d < K_CHANNELS)[None, :]
    q_RD = tl.load(q + query[:, None] * K_CHANNELS + d[None, :], mask=asked, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, E], tl.float32)
    for at in range(start, stop, TILE):
        token = at + tl.arange(0, TILE)
        held = (token < stop) & (token >= first)
        block = (token // TOKENS).to(tl.int64)
        inner = token % TOKENS
        one = (at + tl.arange(0, 1))[None, :]
        whole = (one // TOKENS).to(tl.int64)
        k_DT = _read(
            keys + block[None, :] * K_BYTES, inner[None, :], d[:, None], held[None, :], (d < K_CHANNELS)[:, None],
            (keys + whole * K_BYTES, one % TOKENS), k_offset, k_group, k_like, K_CHANNELS, K_BITS, True, K_TIME, K_SIDE,
            K_STEPS, K_LOW, K_RUNS, K_FLAT,
        )  # fmt: skip
        if k_rows is not None:
            k_DT *= tl.load(k_rows + tl.load(row_offsets + own) + token, mask=held, other=0.0)[None, :]
        score = tl.dot(q_RD.to(COMPUTE), k_DT.to(COMPUTE), input_precision="ieee") * scaling
        if CAPPED:
            # tanh of x as 1 - 2 / (e^2x + 1)
            score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
        score = tl.where(held[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.maximum(higher, -1e38)  # where nothing has counted yet
        weight = tl.exp(score - safe[:, None])
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(weight, 1)
        v_TE = _read(
            values + block[:, None] * V_BYTES, inner[:, None], e[None, :], held[:, None], (e < V_CHANNELS)[None, :],
            (values + whole * V_BYTES, one % TOKENS), v_offset, v_group, v_like, V_CHANNELS, V_BITS, False, V_TIME,
            V_SIDE, V_STEPS, V_LOW, V_RUNS, V_FLAT,
        )  # fmt: skip
        if v_rows is not None:
            v_TE *= tl.load(v_rows + tl.load(row_offsets + own) + token, mask=held, other=0.0)[:, None]
        acc = acc * shrink[:, None] + tl.dot(weight.to(COMPUTE), v_TE.to(COMPUTE), input_precision="ieee")
        top = higher
    place = query * P + stretch
    tl.store(tops + place, top, mask=real)
    tl.store(totals + place, total, mask=real)
    tl.store(sums + place[:, None] * V_CHANNELS + e[None, :], acc, mask=real[:, None] & (e < V_CHANNELS)[None, :])


def reads(layout: BlockLayout) -> bool:
    """Whether the kernel reads blocks of a layout."""
    return layout.bits in BITS and layout.grid == "integers"


def attend(
    q_BQHD: Tensor, parts: Sequence[Part], window: Window, scale: float, softcap: float = 0.0, causal: bool = True
) -> Tensor:
    """`kernels.attention.attend`, with parts read by the kernel: (B, Q, H, E) in q's dtype. Products are in that dtype,
    sums in float32.

    Args:
        q_BQHD: float16, bfloat16 or float32; rotated, not scaled.

    Raises:
        RegaugeError: the kernel does not read such blocks, or shapes do not fit.
    """
    batch, new, heads, channels = q_BQHD.shape
    kv_heads, rows, size = window.keys_BKTD.shape[1], window.keys_BKTD.shape[2], window.values_BKTE.shape[3]
    need(heads % kv_heads == 0, lambda: f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    need(not (parts and window.look_back), lambda: "a window that looks back only so far stands before parts")
    group = heads // kv_heads
    q_BKRD = q_BQHD.view(batch, new, kv_heads, group, channels).transpose(1, 2).flatten(2, 3).contiguous()
    found = [_stretches(q_BKRD, part, scale, softcap) for part in parts]
    found.append(_window(q_BKRD, window, (new, rows, scale, softcap, causal)))
    sums, tops, totals = (torch.cat(some, 3) for some in zip(*found, strict=True))
    highest = tops.amax(3, keepdim=True).clamp(min=-1e38)
    weight = (tops - highest).exp()
    total = (weight * totals).sum(3, keepdim=True)
    out_BKRE = (weight[..., None] * sums).sum(3) / torch.where(total > 0, total, 1.0)
    out = out_BKRE.view(batch, kv_heads, new, group, size).transpose(1, 2)
    return out.reshape(batch, new, heads, size).to(q_BQHD.dtype)


def _window(q_BKRD: Tensor, window: Window, how: tuple[int, int, float, float, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The window as one stretch."""
    new, rows, scale, softcap, causal = how
    device, group = q_BKRD.device, q_BKRD.shape[2] // how[0]
    score_BKRT = q_BKRD.float() @ window.keys_BKTD.float().mT * scale
    if softcap > 0:
        score_BKRT = softcap * torch.tanh(score_BKRT / softcap)
    row_T = torch.arange(rows, dtype=torch.int64, device=device)
    last_BK11 = rows if window.lengths_BK is None else window.lengths_BK.to(device)[..., None, None].long()
    first_BK11 = 0 if window.firsts_BK is None else window.firsts_BK.to(device)[..., None, None].long()
    own_R1 = torch.arange(new, dtype=torch.int64, device=device).repeat_interleave(group)[:, None] - new
    shown = (row_T >= first_BK11) & (row_T < last_BK11) & (row_T <= own_R1 + last_BK11 if causal else True)
    if window.look_back:
        shown = shown & (row_T > own_R1 + last_BK11 - window.look_back)
    score_BKRT = score_BKRT.masked_fill(~shown, -torch.inf)
    top = score_BKRT.amax(3)
    weight = (score_BKRT - top.clamp(min=-1e38)[..., None]).exp()
    return (weight @ window.values_BKTE.float())[..., None, :], top[..., None], weight.sum(3)[..., None]


def _stretches(q_BKRD: Tensor, part: Part, scale: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """(sums (B, K, R, P, E), greatest scores, totals of weights (B, K, R, P)) of one part."""
    (batch, kv_heads, queries, channels), device = q_BKRD.shape, q_BKRD.device
    keys, values = part.keys, part.values
    unread = next((layout for layout in (keys, values) if not reads(layout)), keys)
    need(reads(unread), lambda: f"codes of {unread.bits} bits of the grid {unread.grid} are not read on a GPU")
    need(keys.channels == channels, lambda: f"queries have {channels} channels, keys of a part {keys.channels}")
    tile, own = _tile(keys, values), max(1, batch * kv_heads)
    room = (
        part.key_blocks.numel() // keys.bytes * keys.tokens // own
    )  # of a head: asking the lengths would wait for them
    stretches = max(1, min(room // (2 * tile), PROGRAMS * processors(device) // own))
    shape = (batch, kv_heads, queries, stretches)
    sums = torch.empty((*shape, values.channels), dtype=torch.float32, device=device)
    tops, totals = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    tables = (
        None if one is None else one.to(device).contiguous()
        for one in (part.lengths_BK, part.firsts_BK, part.key_rows, part.value_rows, part.row_offsets_BK)
    )
    sizes = {
        f"{letter}_{name}": value
        for letter, layout in (("K", keys), ("V", values))
        for name, value in _constants(layout, tile).items()
    }
    launch(
        device, _attend, (batch * kv_heads, stretches), q_BKRD, *_operands(part, keys, device),
        *_operands(part, values, device), *tables, sums, tops, totals, queries, scale, softcap or 1.0,
        COMPUTE=compute_dtype(q_BKRD.dtype), ROWS=_power(queries), D=_power(channels), E=_power(values.channels),
        TOKENS=keys.tokens, CAPPED=softcap > 0, TILE=tile, P=stretches, num_warps=WARPS, **sizes,
    )  # fmt: skip
    return sums, tops, totals


def _power(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _operands(part: Part, layout: BlockLayout, device: torch.device) -> tuple[object, ...]:
    keys = layout.role == "keys"
    blocks, offsets = (part.key_blocks, part.key_offsets_BK) if keys else (part.value_blocks, part.value_offsets_BK)
    like = torch.empty(1, dtype=layout.dtype, device=device)
    return blocks, offsets.to(device).contiguous(), like, layout.offset, layout.group or 1


def _tile(*layouts: BlockLayout) -> int:
    """Tokens of a tile: as many as lie in one block, and in one group of steps along time."""
    spans = [layout.tokens for layout in layouts]
    spans += [layout.group for layout in layouts if layout.bits != 16 and layout.axis == "time"]
    return max(LEAST, min(MOST, math.gcd(*spans, MOST)))


def _constants(layout: BlockLayout, tile: int) -> dict[str, int]:
    """Where things lie in a block."""
    padded = -(-layout.channels // 16) * 16
    pieces = {1: 8, 2: 4, 3: 8, 4: 2}.get(layout.bits, 1)
    return {
        "CHANNELS": layout.channels,
        "BYTES": layout.bytes,
        "BITS": layout.bits,
        "TIME": layout.axis == "time",
        "SIDE": padded if layout.axis == "time" else layout.tokens,
        "STEPS": 0 if layout.bits == 16 else layout.step_bytes,
        "LOW": int(layout.low),
        "FLAT": layout.bits != 16
        and (layout.group % tile == 0 if layout.axis == "time" else layout.group == layout.channels),
        "RUNS": layout.depth // (4 * pieces) if layout.bits != 16 else 1,
    }
