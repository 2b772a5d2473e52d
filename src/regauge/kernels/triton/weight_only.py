"""x Wᵀ + b with W packed at 1 to 8 bits and x in float (W4A16): `reference.linear` on a GPU.

One or two tokens: sums of products, without tiles (`vectors`). A few more: each tile of codes becomes weights in
registers and is multiplied there. Either way the packed bytes are read once. Many tokens (over `DEQUANTISE`): the
weights are written out once in the dtype of x and torch multiplies.

A step (scale, zero point) covers a group. Where a tile of 128 channels lies in one group, sums are scaled once a tile
and the products are of whole codes, which float16 and bfloat16 hold exactly; in smaller groups each weight is scaled.

Legend: T tokens, I input channels, O output channels, B bytes in a packed row, N groups along a row.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from regauge.kernels.triton.dequantise import check_weights, dequantise_op
from regauge.kernels.triton.launch import (
    FLOATS,
    blocks,
    check,
    check_device,
    compute_dtype,
    launch,
    multiply,
    need,
    units,
)
from regauge.kernels.triton.tiles import edges, eights, finish, lane, value
from regauge.kernels.triton.vectors import EIGHTS as LONG
from regauge.kernels.triton.vectors import MOST, ROWS, WARPS, vectors

EIGHTS = 16
"""Eights in a tile along a row: 128 channels. 16 is the least inner edge of a product."""
DEQUANTISE = 128
"""More tokens than this go through `dequantise` and torch's product."""


@triton.jit
@no_type_check
def _linear(
    x,
    packed,
    table,
    scale,
    zero,
    inputs,
    width,
    group,
    groups,
    y,
    x_scale,
    w_scale,
    bias,
    tokens,
    outputs,
    size,
    COMPUTE: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE_STEP: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """WHOLE: every tile lies in one group. ONE_STEP: the rows of W share one row of `scale` and `zero`."""
    m, n = edges(M, N)
    part = tl.program_id(2)
    rows = packed + n.to(tl.int64)[None, :] * width
    steps = n * 0 if ONE_STEP else n * groups
    x_rows = x + m.to(tl.int64)[:, None] * inputs
    acc = tl.zeros([M, N], tl.float32)
    for tile in range(part, tl.cdiv(inputs, 8 * G), SPLIT):
        g = tile * G + tl.arange(0, G)
        inside = (8 * g < inputs)[:, None] & (n < outputs)[None, :]
        word = eights(rows, g[:, None], inside, width, BITS, UNIT)
        if WHOLE:
            at = (steps + tile * 8 * G // group)[None, :]
            known = (n < outputs)[None, :]
            sums = tl.zeros([M, N], tl.float32)
        else:
            at = steps[None, :] + (8 * g // group)[:, None]
            known = inside
            sums = acc
        step = tl.load(scale + at, mask=known, other=0.0).to(tl.float32)
        if zero is not None:
            shift = tl.load(zero + at, mask=known, other=0.0).to(tl.float32)
        for l in tl.static_range(8):
            w = value(lane(word, l, BITS), table, LOW)
            if zero is not None:
                w -= shift
            if not WHOLE:
                w *= step
            k = 8 * g + l
            x_tile = tl.load(x_rows + k[None, :], mask=(m < tokens)[:, None] & (k < inputs)[None, :], other=0.0)
            sums = tl.dot(x_tile.to(COMPUTE), w.to(COMPUTE), sums, input_precision="ieee")
        if WHOLE:
            acc += sums * step
        else:
            acc = sums
    finish(acc, y + part.to(tl.int64) * size, x_scale, w_scale, bias, m, n, tokens, outputs, PER_ROW)


def linear(
    x: Tensor,
    packed_OB: Tensor,
    bits: int,
    scale_ON: Tensor,
    *,
    low: int = 0,
    table: Tensor | None = None,
    zero_ON: Tensor | None = None,
    bias_O: Tensor | None = None,
    split: int = 0,
) -> Tensor:
    """x Wᵀ + b, where W is scale · (value[code] − zero) and value[code] is table[code], or code + low.

    Sums are float32; the result has the dtype of `x`. Raises RegaugeError where the operands do not fit.

    Args:
        x: (..., I) float16, bfloat16 or float32.
        packed_OB: uint8, rows as `reference.pack` makes them.
        scale_ON: float; N is 1, or I / N is a multiple of 8; O may be 1.
        low: the value of code 0: −2^(bits − 1) for symmetric integers.
        table: 2^bits floats, for code books such as NF4 and FP4.
        split: parts of each row that programs share; 0 chooses.
    """
    need(
        x.dtype in FLOATS and x.dim() > 0, lambda: f"x is {x.dtype} of {x.dim()} dimensions; it must be rows of floats"
    )
    check_weights(packed_OB, bits, x.shape[-1], low, table, scale_ON, zero_ON)
    if bias_O is not None:
        check("bias", bias_O, FLOATS, (packed_OB.shape[0],))
    check_device(x, packed_OB, table, scale_ON, zero_ON, bias_O)
    y: Tensor = torch.ops.regauge_triton.linear(x, packed_OB, bits, scale_ON, low, table, zero_ON, bias_O, split)
    return y


@torch.library.custom_op(
    "regauge_triton::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, int bits, Tensor scale, int low, Tensor? table, Tensor? zero, Tensor? bias, "
    "int split) -> Tensor",
)
def _linear_op(
    x: Tensor,
    packed_OB: Tensor,
    bits: int,
    scale_ON: Tensor,
    low: int,
    table: Tensor | None,
    zero_ON: Tensor | None,
    bias_O: Tensor | None,
    split: int,
) -> Tensor:
    inputs, outputs = x.shape[-1], packed_OB.shape[0]
    x_TI = x.reshape(-1, inputs).contiguous()
    y_TO = x.new_empty((x_TI.shape[0], outputs))
    if not y_TO.numel():
        return y_TO.view(*x.shape[:-1], outputs)
    if x_TI.shape[0] > DEQUANTISE and not split:
        w_OI = dequantise_op(packed_OB, bits, inputs, scale_ON, low, table, zero_ON, x.dtype)
        return torch.nn.functional.linear(x, w_OI, None if bias_O is None else bias_O.to(x.dtype))
    rows, groups, count = units(packed_OB, bits), scale_ON.shape[1], x_TI.shape[0]
    sizes = (inputs, rows.shape[1], inputs // groups, groups)
    told: dict[str, Any] = {"LOW": low, "BITS": bits, "UNIT": rows.element_size(), "ONE_STEP": scale_ON.shape[0] == 1}
    if count <= MOST and not split:
        operands = (x_TI, rows, table, scale_ON, zero_ON, bias_O, y_TO, *sizes, count, outputs)
        edges = {"M": triton.next_power_of_2(count), "N": ROWS, "G": LONG, "num_warps": WARPS}
        launch(x.device, vectors, (triton.cdiv(outputs, ROWS),), *operands, **told, **edges)
        return y_TO.view(*x.shape[:-1], outputs)
    tile = 8 * EIGHTS
    steps, wide = triton.cdiv(inputs, tile), x.dtype == torch.float32
    block = blocks(x.device, count, outputs, steps, split, wide, narrow=table is not None)
    multiply(
        *(_linear, y_TO, block, torch.float32, (x_TI, rows, table, scale_ON, zero_ON, *sizes), None, None, bias_O),
        COMPUTE=compute_dtype(x.dtype),
        WHOLE=groups == 1 or inputs // groups % tile == 0,
        G=EIGHTS,
        **told,
    )
    return y_TO.view(*x.shape[:-1], outputs)


@_linear_op.register_fake
def _(
    x: Tensor,
    packed_OB: Tensor,
    bits: int,
    scale_ON: Tensor,
    low: int,
    table: Tensor | None,
    zero_ON: Tensor | None,
    bias_O: Tensor | None,
    split: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed_OB.shape[0]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed_OB, bits, scale_ON, low, table, zero_ON, *_ = inputs
    ctx.save_for_backward(packed_OB, scale_ON, table, zero_ON)
    ctx.bits, ctx.inputs, ctx.low = bits, x.shape[-1], low


def _gradient(ctx: Any, y: Tensor) -> tuple[Tensor | None, ...]:
    """Of x alone: dy W."""
    packed_OB, scale_ON, table, zero_ON = ctx.saved_tensors
    w_OI = dequantise_op(packed_OB, ctx.bits, ctx.inputs, scale_ON, ctx.low, table, zero_ON, y.dtype)
    return (y @ w_OI, *(None,) * 8)


_linear_op.register_autograd(_gradient, setup_context=_remember)
