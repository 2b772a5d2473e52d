"""Products with e4m3 weights, inputs in float or in e4m3; sums in float32. A step covers a row or a group of a row.

GPUs that multiply e4m3 themselves (NVIDIA from compute capability 8.9) do so where both operands have it; elsewhere the
bytes become float16 first, which holds every e4m3 number exactly, and so does bfloat16.

Legend: T tokens, I input channels, O output channels, N groups along a row.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from regauge.kernels.triton.launch import (
    E4M3,
    FLOATS,
    blocks,
    check,
    check_device,
    compute_dtype,
    multiply,
    native_fp8,
    need,
)
from regauge.kernels.triton.tiles import e4m3, edges, finish

CHANNELS = 128
"""Channels in a tile along a row; fewer where groups are smaller, never under 32, the least inner edge for e4m3."""


@triton.jit
@no_type_check
def _fp8(
    x,
    w,
    group_scale,
    inputs,
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
    BOTH: tl.constexpr,
    NATIVE: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    PER_ROW: tl.constexpr,
):
    """BOTH: inputs are e4m3 too. `group_scale`, where given, scales the sums of each tile, which lies in one group."""
    m, n = edges(M, N)
    part = tl.program_id(2)
    rows = w + n.to(tl.int64)[None, :] * inputs
    x_rows = x + m.to(tl.int64)[:, None] * inputs
    acc = tl.zeros([M, N], tl.float32)
    for tile in range(part, tl.cdiv(inputs, K), SPLIT):
        k = tile * K + tl.arange(0, K)
        x_tile = tl.load(x_rows + k[None, :], mask=(m < tokens)[:, None] & (k < inputs)[None, :], other=0)
        w_tile = tl.load(rows + k[:, None], mask=(k < inputs)[:, None] & (n < outputs)[None, :], other=0)
        sums = tl.zeros([M, N], tl.float32)
        if NATIVE:  # Hopper keeps 14 bits of a sum inside a product: each tile is added up outside, in float32
            left = x_tile.to(tl.float8e4nv, bitcast=True)
            sums = tl.dot(left, w_tile.to(tl.float8e4nv, bitcast=True), sums, max_num_imprecise_acc=K)
        elif BOTH:
            sums = tl.dot(e4m3(x_tile), e4m3(w_tile), sums)
        else:
            sums = tl.dot(x_tile.to(COMPUTE), e4m3(w_tile).to(tl.float32).to(COMPUTE), sums, input_precision="ieee")
        if group_scale is not None:
            at = n * groups + tile * K // group
            sums *= tl.load(group_scale + at, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        acc += sums
    finish(acc, y + part.to(tl.int64) * size, x_scale, w_scale, bias, m, n, tokens, outputs, PER_ROW)


def fp8(
    x: Tensor,
    w_OI: Tensor,
    w_scale_ON: Tensor,
    *,
    x_scale_T: Tensor | None = None,
    bias_O: Tensor | None = None,
    dtype: torch.dtype | None = None,
    split: int = 0,
) -> Tensor:
    """x Wᵀ + b, where W is scale · e4m3.

    Args:
        x: (..., I) float16, bfloat16, float32, or float8_e4m3fn with `x_scale_T`, a step for each of T tokens.
        w_OI: float8_e4m3fn, or its bytes as uint8.
        w_scale_ON: float; N is 1, or I / N is 32, 64, or a multiple of 128. (1, 1) is one step for the matrix.
        dtype: of the result; that of `x` if not given, or float32 for e4m3 inputs.
        split: parts of each row that programs share; 0 chooses.
    """
    need(
        x.dim() > 0 and x.dtype in (*FLOATS, E4M3),
        lambda: f"x is {x.dtype} of {x.dim()} dimensions; it must be rows of floats or of float8_e4m3fn",
    )
    inputs = x.shape[-1]
    check("w", w_OI, (E4M3, torch.uint8), (None, inputs))
    outputs = w_OI.shape[0]
    need(w_scale_ON.dim() == 2, lambda: f"w_scale has shape {tuple(w_scale_ON.shape)}; it must be rows by groups")
    groups = w_scale_ON.shape[1]
    check("w_scale", w_scale_ON, FLOATS, (1 if w_scale_ON.shape == (1, 1) else outputs, groups))
    group = inputs // groups if groups and inputs % groups == 0 else 0
    need(
        groups == 1 or group in (32, 64) or (group > 0 and group % CHANNELS == 0),
        lambda: f"{groups} groups of {inputs} channels: FP8 takes one group, or groups of 32, 64 or a multiple of 128",
    )
    need(
        (x.dtype == E4M3) == (x_scale_T is not None),
        lambda: "x_scale goes with float8_e4m3fn inputs: give both or neither",
    )
    if x_scale_T is not None:
        check("x_scale", x_scale_T, FLOATS, (x.shape[:-1].numel(),))
    if bias_O is not None:
        check("bias", bias_O, FLOATS, (outputs,))
    wanted = dtype or (torch.float32 if x.dtype == E4M3 else x.dtype)
    need(wanted in FLOATS, lambda: f"results are float16, bfloat16 or float32, not {wanted}")
    check_device(x, w_OI, w_scale_ON, x_scale_T, bias_O)
    y: Tensor = torch.ops.regauge_triton.fp8(x, w_OI, w_scale_ON, x_scale_T, bias_O, wanted, split)
    return y


@torch.library.custom_op(
    "regauge_triton::fp8",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor w_scale, Tensor? x_scale, Tensor? bias, ScalarType dtype, int split) -> Tensor",
)
def _fp8_op(
    x: Tensor,
    w_OI: Tensor,
    w_scale_ON: Tensor,
    x_scale_T: Tensor | None,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    split: int,
) -> Tensor:
    inputs, outputs, groups = x.shape[-1], w_OI.shape[0], w_scale_ON.shape[1]
    both = x.dtype == E4M3
    x_TI = (x.view(torch.uint8) if both else x).reshape(-1, inputs).contiguous()
    y_TO = x_TI.new_empty((x_TI.shape[0], outputs), dtype=dtype)
    if not y_TO.numel():
        return y_TO.view(*x.shape[:-1], outputs)
    wide = x.dtype == torch.float32
    tile = 32 if wide else CHANNELS if groups == 1 else min(CHANNELS, inputs // groups)
    block = blocks(x.device, x_TI.shape[0], outputs, triton.cdiv(inputs, tile), split, wide)
    row_scale, group_scale = (w_scale_ON.view(-1), None) if groups == 1 else (None, w_scale_ON)
    operands = (x_TI, w_OI.view(torch.uint8), group_scale, inputs, inputs // groups, groups)
    multiply(
        *(_fp8, y_TO, block, torch.float32, operands, x_scale_T, row_scale, bias_O),
        COMPUTE=tl.float16 if both else compute_dtype(x.dtype),
        BOTH=both,
        NATIVE=both and native_fp8(x.device),
        K=tile,
    )
    return y_TO.view(*x.shape[:-1], outputs)


@_fp8_op.register_fake
def _(
    x: Tensor,
    w_OI: Tensor,
    w_scale_ON: Tensor,
    x_scale_T: Tensor | None,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    split: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_OI.shape[0]), dtype=dtype)
