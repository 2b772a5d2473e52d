"""Products of integers, summed exactly in int32, then scaled by token and by output channel.

`w8a8` reads int8 weights. `packed_int` reads weights packed at 1 to 8 bits, `w6a6` weights held as two planes, the low
four bits and the high two, joined in registers: neither plane straddles a byte. Inputs are int8 however few bits they
use; int6 inputs lie in −32 … 31.

Exact while 2^14 · I < 2^31: up to 131,071 input channels, whatever the values; more are refused.

Legend: T tokens, I input channels, O output channels, B bytes in a packed row.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from regauge.kernels.reference import pack, packed_bytes
from regauge.kernels.triton.launch import FLOATS, blocks, check, check_device, multiply, need, units
from regauge.kernels.triton.tiles import edges, eights, finish, lane

EIGHTS = 32
"""Eights in a tile along a row: 256 channels. 32 is the least inner edge of a product of int8."""
CHANNELS = 128
"""Channels in a tile along a row of int8 weights."""
LIMIT = (1 << 17) - 1
"""Input channels up to which int32 cannot overflow."""


@triton.jit
@no_type_check
def _packed(
    x,
    low_plane,
    high_plane,
    inputs,
    width,
    high_width,
    y,
    x_scale,
    w_scale,
    bias,
    tokens,
    outputs,
    size,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    HIGH_UNIT: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """LOW: the integer of code 0. HIGH_BITS: bits of the second plane, above the first one's; 0 where there is none."""
    m, n = edges(M, N)
    part = tl.program_id(2)
    rows = low_plane + n.to(tl.int64)[None, :] * width
    if HIGH_BITS:
        high_rows = high_plane + n.to(tl.int64)[None, :] * high_width
    x_rows = x + m.to(tl.int64)[:, None] * inputs
    acc = tl.zeros([M, N], tl.int32)
    for tile in range(part, tl.cdiv(inputs, 8 * G), SPLIT):
        g = tile * G + tl.arange(0, G)
        inside = (8 * g < inputs)[:, None] & (n < outputs)[None, :]
        word = eights(rows, g[:, None], inside, width, BITS, UNIT)
        if HIGH_BITS:
            high = eights(high_rows, g[:, None], inside, high_width, HIGH_BITS, HIGH_UNIT)
        for l in tl.static_range(8):
            code = lane(word, l, BITS)
            if HIGH_BITS:
                code |= lane(high, l, HIGH_BITS) << BITS
            k = 8 * g + l
            x_tile = tl.load(x_rows + k[None, :], mask=(m < tokens)[:, None] & (k < inputs)[None, :], other=0)
            acc = tl.dot(x_tile, (code + LOW).to(tl.int8), acc, out_dtype=tl.int32)
    finish(acc, y + part.to(tl.int64) * size, x_scale, w_scale, bias, m, n, tokens, outputs, PER_ROW)


@triton.jit
@no_type_check
def _bytes(
    x,
    w,
    inputs,
    y,
    x_scale,
    w_scale,
    bias,
    tokens,
    outputs,
    size,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    m, n = edges(M, N)
    part = tl.program_id(2)
    rows = w + n.to(tl.int64)[None, :] * inputs
    x_rows = x + m.to(tl.int64)[:, None] * inputs
    acc = tl.zeros([M, N], tl.int32)
    for tile in range(part, tl.cdiv(inputs, K), SPLIT):
        k = tile * K + tl.arange(0, K)
        x_tile = tl.load(x_rows + k[None, :], mask=(m < tokens)[:, None] & (k < inputs)[None, :], other=0)
        w_tile = tl.load(rows + k[:, None], mask=(k < inputs)[:, None] & (n < outputs)[None, :], other=0)
        acc = tl.dot(x_tile, w_tile, acc, out_dtype=tl.int32)
    finish(acc, y + part.to(tl.int64) * size, x_scale, w_scale, bias, m, n, tokens, outputs, PER_ROW)


def split_planes(codes_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Packed planes of 6-bit codes, uint8: the low four bits, and the high two."""
    return pack(codes_OI & 15, 4), pack(codes_OI >> 4, 2)


def w8a8(
    x: Tensor,
    x_scale_T: Tensor | None,
    w_OI: Tensor,
    w_scale_O: Tensor | None,
    bias_O: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    split: int = 0,
) -> Tensor:
    """(x Wᵀ) · x_scale · w_scale + b; with neither scale, the int32 sums themselves.

    Args:
        x: (..., I) int8. w_OI: int8.
        x_scale_T: float, a step for each token, T of them in all. w_scale_O: float, for each output channel, or one.
        dtype: of the result, float16, bfloat16 or float32.
        split: parts of each row that programs share; 0 chooses.
    """
    check("w", w_OI, (torch.int8,), (None, x.shape[-1] if x.dim() else None))
    return _run(x, x_scale_T, [w_OI], [], 0, w_OI.shape[0], w_scale_O, bias_O, dtype, split)


def packed_int(
    x: Tensor,
    x_scale_T: Tensor | None,
    packed_OB: Tensor,
    bits: int,
    w_scale_O: Tensor | None,
    bias_O: Tensor | None = None,
    *,
    low: int | None = None,
    dtype: torch.dtype = torch.float32,
    split: int = 0,
) -> Tensor:
    """`w8a8` with W = code + low, packed as `reference.pack` makes rows.

    Args:
        bits: 1 to 8.
        low: the integer of code 0, so that all lie in int8; −2^(bits − 1) if not given.
    """
    need(1 <= bits <= 8, lambda: f"codes have 1 to 8 bits, not {bits}")
    first = -(1 << (bits - 1)) if low is None else low
    need(
        first >= -128 and first + (1 << bits) - 1 <= 127,
        lambda: f"codes of {bits} bits from {first} do not fit int8; take low from −128 to {128 - (1 << bits)}",
    )
    check("packed", packed_OB, (torch.uint8,), (None, packed_bytes(x.shape[-1] if x.dim() else 0, bits)))
    return _run(x, x_scale_T, [packed_OB], [bits], first, packed_OB.shape[0], w_scale_O, bias_O, dtype, split)


def w6a6(
    x: Tensor,
    x_scale_T: Tensor | None,
    low_OB: Tensor,
    high_OB: Tensor,
    w_scale_O: Tensor | None,
    bias_O: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    split: int = 0,
) -> Tensor:
    """`w8a8` with 6-bit W = code − 32, in the planes that `split_planes` makes: 0.75 bytes a weight, aligned at any I.

    Args:
        x: (..., I) int8; int6 inputs and int8 inputs alike.
        low_OB: uint8, four bits a weight. high_OB: uint8, two bits a weight.
    """
    inputs = x.shape[-1] if x.dim() else 0
    check("low", low_OB, (torch.uint8,), (None, packed_bytes(inputs, 4)))
    check("high", high_OB, (torch.uint8,), (low_OB.shape[0], packed_bytes(inputs, 2)))
    return _run(x, x_scale_T, [low_OB, high_OB], [4, 2], -32, low_OB.shape[0], w_scale_O, bias_O, dtype, split)


def _run(
    x: Tensor,
    x_scale_T: Tensor | None,
    weights: list[Tensor],
    bits: list[int],
    low: int,
    outputs: int,
    w_scale_O: Tensor | None,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    split: int,
) -> Tensor:
    need(
        x.dtype == torch.int8 and x.dim() > 0,
        lambda: f"x is {x.dtype} of {x.dim()} dimensions; it must be rows of int8",
    )
    inputs = x.shape[-1]
    need(inputs <= LIMIT, lambda: f"{inputs} input channels could overflow int32; the integer kernels take {LIMIT}")
    scaled = (x_scale_T is not None, w_scale_O is not None, bias_O is not None)
    need(
        (scaled[0] and scaled[1]) or not any(scaled),
        lambda: "give both x_scale and w_scale, or neither and no bias for the int32 sums",
    )
    if x_scale_T is not None and w_scale_O is not None:
        need(dtype in FLOATS, lambda: f"results are float16, bfloat16 or float32, not {dtype}")
        check("x_scale", x_scale_T, FLOATS, (x.shape[:-1].numel(),))
        check("w_scale", w_scale_O, FLOATS, (1,) if w_scale_O.shape == (1,) else (outputs,))
    if bias_O is not None:
        check("bias", bias_O, FLOATS, (outputs,))
    check_device(x, x_scale_T, *weights, w_scale_O, bias_O)
    y: Tensor = torch.ops.regauge_triton.integer(x, x_scale_T, weights, bits, low, w_scale_O, bias_O, dtype, split)
    return y


@torch.library.custom_op(
    "regauge_triton::integer",
    mutates_args=(),
    schema="(Tensor x, Tensor? x_scale, Tensor[] weights, int[] bits, int low, Tensor? w_scale, Tensor? bias, "
    "ScalarType dtype, int split) -> Tensor",
)
def _integer_op(
    x: Tensor,
    x_scale_T: Tensor | None,
    weights: list[Tensor],
    bits: list[int],
    low: int,
    w_scale_O: Tensor | None,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    split: int,
) -> Tensor:
    """One weight and no bits: int8. One and its bits: packed. Two: planes, low first."""
    inputs, outputs = x.shape[-1], weights[0].shape[0]
    x_TI = x.reshape(-1, inputs).contiguous()
    y_TO = x.new_empty((x_TI.shape[0], outputs), dtype=torch.int32 if w_scale_O is None else dtype)
    if not y_TO.numel():
        return y_TO.view(*x.shape[:-1], outputs)
    steps = triton.cdiv(inputs, 8 * EIGHTS if bits else CHANNELS)
    block = blocks(x.device, x_TI.shape[0], outputs, steps, split)
    last = (x_scale_T, w_scale_O, bias_O)
    if not bits:
        multiply(_bytes, y_TO, block, torch.int32, (x_TI, weights[0], inputs), *last, K=CHANNELS)
    else:
        low_rows = units(weights[0], bits[0])
        high_rows = units(weights[1], bits[1]) if len(bits) > 1 else None
        widths = (inputs, low_rows.shape[1], 0 if high_rows is None else high_rows.shape[1])
        multiply(
            *(_packed, y_TO, block, torch.int32, (x_TI, low_rows, high_rows, *widths), *last),
            LOW=low,
            BITS=bits[0],
            UNIT=low_rows.element_size(),
            HIGH_BITS=0 if high_rows is None else bits[1],
            HIGH_UNIT=1 if high_rows is None else high_rows.element_size(),
            G=EIGHTS,
        )
    return y_TO.view(*x.shape[:-1], outputs)


@_integer_op.register_fake
def _(
    x: Tensor,
    x_scale_T: Tensor | None,
    weights: list[Tensor],
    bits: list[int],
    low: int,
    w_scale_O: Tensor | None,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    split: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights[0].shape[0]), dtype=torch.int32 if w_scale_O is None else dtype)
