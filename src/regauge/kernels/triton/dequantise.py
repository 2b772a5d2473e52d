"""Weights of packed codes, on a GPU: `reference.dequantise(reference.unpack(...))` in one kernel.

Legend: I input channels, O output channels, B bytes in a packed row, N groups along a row.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from regauge.kernels.reference import packed_bytes
from regauge.kernels.triton.launch import FLOATS, check, check_device, launch, need
from regauge.kernels.triton.tiles import edges, value


@triton.jit
@no_type_check
def _dequantise(
    packed,
    table,
    scale,
    zero,
    inputs,
    width,
    group,
    groups,
    w,
    outputs,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    ONE_STEP: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    n, k = edges(N, K)
    inside = (n < outputs)[:, None] & (k < inputs)[None, :]
    first = (k * BITS >> 3)[None, :]
    rows = packed + n.to(tl.int64)[:, None] * width
    pair = tl.load(rows + first, mask=inside, other=0).to(tl.int32)
    if 8 % BITS:  # a code may straddle two bytes
        pair |= tl.load(rows + first + 1, mask=inside & (first + 1 < width), other=0).to(tl.int32) << 8
    code = (pair >> (k * BITS & 7)[None, :]) & ((1 << BITS) - 1)
    at = (n * 0 if ONE_STEP else n * groups)[:, None] + (k // group)[None, :]
    w_tile = value(code, table, LOW)
    if zero is not None:
        w_tile -= tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    w_tile *= tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(w + n.to(tl.int64)[:, None] * inputs + k[None, :], w_tile.to(w.dtype.element_ty), mask=inside)


def check_weights(
    packed_OB: Tensor, bits: int, inputs: int, low: int, table: Tensor | None, scale_ON: Tensor, zero_ON: Tensor | None
) -> None:
    """Refuses packed weights whose parts contradict each other."""
    need(1 <= bits <= 8, lambda: f"codes have 1 to 8 bits, not {bits}")
    check("packed", packed_OB, (torch.uint8,), (None, packed_bytes(inputs, bits)))
    need(len(scale_ON.shape) == 2, lambda: f"scale has shape {tuple(scale_ON.shape)}; a step needs a row and a group")
    rows, groups = scale_ON.shape
    need(rows in (1, packed_OB.shape[0]), lambda: f"scale has {rows} rows; W has {packed_OB.shape[0]}")
    need(
        groups == 1 or (groups > 0 and inputs % groups == 0 and inputs // groups % 8 == 0),
        lambda: (
            f"{groups} groups of {inputs} channels: the GPU kernels take one group, or equal groups of 8 or a multiple"
        ),
    )
    check("scale", scale_ON, FLOATS, (rows, groups))
    if zero_ON is not None:
        check("zero", zero_ON, FLOATS, (rows, groups))
    if table is not None:
        check("table", table, FLOATS, (1 << bits,))
        need(low == 0, lambda: f"low={low} and a table are given; a table already says what each code stands for")


def dequantise(
    packed_OB: Tensor,
    bits: int,
    inputs: int,
    scale_ON: Tensor,
    *,
    low: int = 0,
    table: Tensor | None = None,
    zero_ON: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W (O, I) itself; the arguments are those of `linear`."""
    check_weights(packed_OB, bits, inputs, low, table, scale_ON, zero_ON)
    need(dtype in FLOATS, lambda: f"weights are float16, bfloat16 or float32, not {dtype}")
    check_device(packed_OB, table, scale_ON, zero_ON)
    w: Tensor = torch.ops.regauge_triton.dequantise(packed_OB, bits, inputs, scale_ON, low, table, zero_ON, dtype)
    return w


@torch.library.custom_op(
    "regauge_triton::dequantise",
    mutates_args=(),
    schema="(Tensor packed, int bits, int inputs, Tensor scale, int low, Tensor? table, Tensor? zero, "
    "ScalarType dtype) -> Tensor",
)
def dequantise_op(
    packed_OB: Tensor,
    bits: int,
    inputs: int,
    scale_ON: Tensor,
    low: int,
    table: Tensor | None,
    zero_ON: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    outputs, groups = packed_OB.shape[0], scale_ON.shape[1]
    w_OI = torch.empty((outputs, inputs), dtype=dtype, device=packed_OB.device)
    if w_OI.numel():
        launch(
            *(w_OI.device, _dequantise, (triton.cdiv(outputs, 8), triton.cdiv(inputs, 256))),
            *(packed_OB, table, scale_ON, zero_ON, inputs, packed_OB.shape[1], inputs // groups, groups, w_OI, outputs),
            LOW=low,
            BITS=bits,
            ONE_STEP=scale_ON.shape[0] == 1,
            N=8,
            K=256,
        )
    return w_OI


@dequantise_op.register_fake
def _(
    packed_OB: Tensor,
    bits: int,
    inputs: int,
    scale_ON: Tensor,
    low: int,
    table: Tensor | None,
    zero_ON: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return packed_OB.new_empty((packed_OB.shape[0], inputs), dtype=dtype)
