"""Packed matrices on a GPU: how each Triton kernel of the capability table wants its matrix held, and its product.

Bytes are those of the artifact: rows of codes as `reference.pack` makes them. Steps are held in the narrowest float
that has them exactly: bfloat16, float16 or float32 (NVFP4 and M2, whose steps are of two levels, in float32). Sums are
float32, or exact int32 where inputs are integers. Products are operators of torch (`torch.ops.regauge_triton`), so
`torch.compile` sees through them.

Legend: O output channels, I input channels, N groups along a row, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format
from regauge.formats.readings import Reading
from regauge.kernels.reference import pack, unpack
from regauge.runtime.matrices.multiply import Held, Way

Shape = tuple[int, int]
Bytes = Mapping[str, Tensor]
Product = Callable[[Tensor, Bytes], Tensor]
WIDE = 4
"""Bits of the lower plane of six."""


def way(kernel: str, fmt: Format, shape: Shape, reading: Reading | None) -> Way:
    """The way of a kernel of the table's rows for `cuda`.

    Args:
        reading: of inputs, which the kernel multiplies as codes; None: as they are.

    Raises:
        KeyError: there is no such kernel.
    """
    hold, weights, product = KERNELS[kernel](fmt, shape, reading)

    def rows(held: Bytes, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return weights(_some(held, slice(start, stop), shape[0]), dtype)

    def take(held: Bytes, index: Tensor, dtype: torch.dtype) -> Tensor:
        return weights(_some(held, index, shape[0]), dtype)

    name = kernel if reading is None else f"{kernel}, {reading.name} inputs"
    return Way(name, hold, rows, take, product, device="cuda")


Weights = Callable[[Held, torch.dtype], Tensor]
"""Some rows of what is held → weights in a dtype."""
Made = tuple[Callable[[Codes], Held], Weights, Product]


def _some(held: Bytes, index: slice | Tensor, rows: int) -> Held:
    """Rows of what is held; what all rows share stays whole."""
    return {name: part if name in SHARED or part.shape[0] != rows else part[index] for name, part in held.items()}


SHARED = ("table",)


def _exactly(steps: Tensor) -> Tensor:
    """The same numbers in the narrowest float that has them."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(steps.to(dtype).float(), steps):
            return steps.to(dtype)
    return steps


def _steps(codes: Codes, fmt: Format, shape: Shape) -> Tensor:
    """scale_ON, or (1, 1) where one step serves the matrix."""
    whole = fmt.grain.groups(shape)[0] == 1
    return _exactly(codes.step.scale_G1.float().reshape(1 if whole else shape[0], -1))


def _linear(fmt: Format, shape: Shape, reading: Reading | None) -> Made:
    from regauge.kernels import triton

    grid, columns = fmt.grid, shape[1]
    whole = grid.kind == "integer"
    low = int(grid.low) if whole else 0

    def hold(codes: Codes) -> Held:
        held = {"packed": pack(codes.codes_OI, grid.bits), "scale": _steps(codes, fmt, shape)}
        if codes.step.zero_G1 is not None:
            held["zero"] = _exactly(codes.step.zero_G1.float().reshape(held["scale"].shape))
        if not whole:
            table = grid.table.nan_to_num(0.0)
            held["table"] = torch.cat([table, table.new_zeros((1 << grid.bits) - len(table))])
        return held

    def weights(held: Held, dtype: torch.dtype) -> Tensor:
        packed, scale, table, zero = held["packed"], held["scale"], held.get("table"), held.get("zero")
        return triton.dequantise(packed, grid.bits, columns, scale, low=low, table=table, zero_ON=zero, dtype=dtype)

    def product(x_TI: Tensor, held: Bytes) -> Tensor:
        packed, scale, table, zero = held["packed"], held["scale"], held.get("table"), held.get("zero")
        return triton.linear(x_TI, packed, grid.bits, scale, low=low, table=table, zero_ON=zero)

    return hold, weights, product


def _fp8(fmt: Format, shape: Shape, reading: Reading | None) -> Made:
    from regauge.kernels import triton

    def hold(codes: Codes) -> Held:
        return {"weight": codes.codes_OI, "scale": _steps(codes, fmt, shape)}

    def weights(held: Held, dtype: torch.dtype) -> Tensor:
        scale_ON = held["scale"].float()
        w_OI = held["weight"].view(torch.float8_e4m3fn).float()
        return (
            (w_OI.view(-1, scale_ON.shape[1], w_OI.shape[1] // scale_ON.shape[1]) * scale_ON.unsqueeze(-1))
            .view(w_OI.shape)
            .to(dtype)
        )

    def product(x_TI: Tensor, held: Bytes) -> Tensor:
        if reading is None:
            return triton.fp8(x_TI, held["weight"], held["scale"])
        rounded = reading.codes(x_TI)
        z_TI, scale_T = rounded.z_TI.to(torch.float8_e4m3fn), rounded.step.scale_G1.reshape(-1)
        return triton.fp8(z_TI, held["weight"], held["scale"], x_scale_T=scale_T, dtype=x_TI.dtype)

    return hold, weights, product


def _integers(fmt: Format, shape: Shape, reading: Reading | None) -> Made:
    """Integer weights in bytes, in planes of 4 and 2 bits, or packed, times integer inputs with a step a token."""
    from regauge.kernels import triton

    bits, columns = fmt.grid.bits, shape[1]
    low = int(fmt.grid.low)
    assert reading is not None, "the table has these kernels for integer inputs alone"

    def hold(codes: Codes) -> Held:
        scale = {"scale": _steps(codes, fmt, shape).reshape(-1)}
        if bits == 8:
            return {"weight": codes.codes_OI.to(torch.int16).add_(low).to(torch.int8)} | scale
        if bits == 6:
            return dict(zip(("low", "high"), triton.split_planes(codes.codes_OI), strict=True)) | scale
        return {"packed": pack(codes.codes_OI, bits)} | scale

    def weights(held: Held, dtype: torch.dtype) -> Tensor:
        if bits == 8:
            z_OI = held["weight"].float()
        elif bits == 6:
            z_OI = (unpack(held["high"], 2, columns) << WIDE | unpack(held["low"], WIDE, columns)).float() + low
        else:
            z_OI = unpack(held["packed"], bits, columns).float() + low
        return (z_OI * held["scale"].float().unsqueeze(-1)).to(dtype)

    def product(x_TI: Tensor, held: Bytes) -> Tensor:
        rounded = reading.codes(x_TI)
        z_TI, step_T, dtype = rounded.z_TI.to(torch.int8), rounded.step.scale_G1.reshape(-1), x_TI.dtype
        if bits == 8:
            return triton.w8a8(z_TI, step_T, held["weight"], held["scale"], dtype=dtype)
        if bits == 6:
            return triton.w6a6(z_TI, step_T, held["low"], held["high"], held["scale"], dtype=dtype)
        return triton.packed_int(z_TI, step_T, held["packed"], bits, held["scale"], low=low, dtype=dtype)

    return hold, weights, product


KERNELS: Mapping[str, Callable[[Format, Shape, Reading | None], Made]] = {
    "linear": _linear,
    "fp8": _fp8,
    "w8a8": _integers,
    "w6a6": _integers,
    "packed_int": _integers,
}
