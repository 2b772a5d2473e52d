"""How a packed matrix is held and multiplied: torch's own packed CPU kernels where they fit, else decoding on the fly.

Every way computes x @ decode(codes)ᵀ up to the rounding of the dtype of x; `benchmarks/linear.py` measures which is
fast. torch's kernels are for few tokens and for bfloat16 only (in float32 and float16 they take fifty times as long),
so with more tokens, and in other dtypes, weights are decoded a block of rows at a time.

Legend: O output channels, I input channels, N groups along a row, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Grid, Step
from regauge.formats.readings import Reading
from regauge.kernels.reference import pack, unpack
from regauge.runtime.matrices import int4, lookup

FEW = 16
"""Tokens up to which torch's packed kernels beat decoding."""
BLOCK = 1 << 18
"""Weights decoded at a time: a few temporaries of them stay in a core's second-level cache."""
GROUPS = (256, 128, 64, 32)
"""Group sizes of torch's int4 kernel."""

Held = dict[str, Tensor]
"""A matrix as it is held: buffers by name."""


@dataclass(frozen=True)
class Way:
    """One way to hold and multiply a matrix.

    Attributes:
        name: of the way, for benchmarks and receipts.
        hold: codes → buffers.
        rows: buffers, rows [start, stop) → weights in a dtype.
        take: buffers, row numbers (n,) → those rows in a dtype.
        product: x_TI, buffers → y_TO in the dtype of x.
        device: the kind of device that alone multiplies by what is held; "" for any.
    """

    name: str
    hold: Callable[[Codes], Held]
    rows: Callable[[Mapping[str, Tensor], int, int, torch.dtype], Tensor]
    take: Callable[[Mapping[str, Tensor], Tensor, torch.dtype], Tensor]
    product: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    device: str = ""


def way(kernel: str, fmt: Format, shape: tuple[int, int], reading: Reading | None) -> Way:
    """The way of a kernel of the capability table that torch has, or `decoded`.

    Args:
        reading: of inputs that the kernel rounds.
    """
    if kernel == "int8 x int8" and reading is not None:
        return _bytes_by_bytes(shape, reading)
    if kernel == "int8":
        return _int8(shape)
    if kernel == "int4":
        return _int4(fmt, shape, next(size for size in GROUPS if fmt.grain.span(shape) % size == 0))
    return _decoded(fmt, shape)


def blocks(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Runs of rows of about `BLOCK` weights; whole blocks of torch's int4 layout."""
    step = max(64, BLOCK // max(shape[1], 1) // 64 * 64)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def by_blocks(x_TI: Tensor, shape: tuple[int, int], rows: Callable[[int, int], Tensor]) -> Tensor:
    """x Wᵀ, decoding a block of rows at a time."""
    out_TO = x_TI.new_empty(x_TI.shape[0], shape[0])
    for start, stop in blocks(shape):
        out_TO[:, start:stop] = torch.nn.functional.linear(x_TI, rows(start, stop))
    return out_TO


def _decoded(fmt: Format, shape: tuple[int, int]) -> Way:
    """Any format: dense bits, and the fields of the steps as stored. Decoded by table where rows are whole bytes."""
    grid, columns, span = fmt.grid, shape[1], fmt.grain.span(shape)
    by_table = lookup.divides(grid, columns) and fmt.grain.groups(shape)[0] % shape[0] == 0
    table_dtype = torch.bfloat16 if lookup.exact(grid, torch.bfloat16) else torch.float32

    def hold(codes: Codes) -> Held:
        planes = lookup.split(codes.codes_OI, grid) if by_table else [pack(codes.codes_OI, grid.bits)]
        return {f"codes{number}": plane for number, plane in enumerate(planes)} | dict(codes.step.fields)

    def cut(tensor: Tensor, index: slice | Tensor) -> Tensor:
        """The part of a field that belongs to some rows; what all rows share has one entry."""
        if tensor.shape[0] % shape[0]:
            return tensor
        return tensor.view(shape[0], -1, *tensor.shape[1:])[index].flatten(0, 1)

    def some(held: Mapping[str, Tensor], index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        planes = [tensor[index] for name, tensor in held.items() if name.startswith("codes")]
        step = fmt.load({name: cut(tensor, index) for name, tensor in held.items() if not name.startswith("codes")})
        if not by_table or dtype == torch.float64:
            codes_OI = unpack(planes[0], grid.bits, columns) if not by_table else _codes(planes, grid, columns)
            return fmt.decode(Codes(codes_OI, step)).to(dtype)
        work = dtype if lookup.exact(grid, dtype) and _exact(step, dtype) else torch.float32
        z_OI = lookup.decode(planes, grid, columns, table_dtype).to(work)
        z_GK = z_OI.view(-1, span)
        if step.zero_G1 is not None:
            z_GK.sub_(step.zero_G1.to(work))
        z_GK.mul_(step.scale_G1.to(work))
        return z_OI.to(dtype)

    def rows(held: Mapping[str, Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return some(held, slice(start, stop), dtype)

    def product(x_TI: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        return by_blocks(x_TI, shape, lambda start, stop: rows(held, start, stop, x_TI.dtype))

    return Way("decoded", hold, rows, some, product)


def _codes(planes: list[Tensor], grid: Grid, columns: int) -> Tensor:
    """Codes of planes."""
    shifted = zip(lookup.planes(grid), planes, strict=True)
    whole = [unpack(plane, bits, columns) << shift for (bits, shift), plane in shifted]
    return torch.stack(whole).sum(0, dtype=torch.uint8)


def _exact(step: Step, dtype: torch.dtype) -> bool:
    """Whether steps and zero points are numbers of this dtype, so that a product with a grid value is rounded once."""
    kept = [step.scale_G1, *([] if step.zero_G1 is None else [step.zero_G1])]
    return all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in kept)


def _int8(shape: tuple[int, int]) -> Way:
    """torch's `_weight_int8pack_mm`: a byte a weight, one step a channel."""

    def hold(codes: Codes) -> Held:
        signed = codes.codes_OI.to(torch.int16).sub_(128).to(torch.int8)
        return {"weight": signed, "scale": codes.step.scale_G1.reshape(-1).to(torch.bfloat16)}

    def product(x_TI: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        if x_TI.shape[0] <= FEW and x_TI.dtype == torch.bfloat16:
            return torch.ops.aten._weight_int8pack_mm(x_TI, held["weight"], held["scale"])  # type: ignore[no-any-return]  # an op
        return torch.nn.functional.linear(x_TI, held["weight"].to(x_TI.dtype)).mul_(held["scale"])

    return Way("int8", hold, _signed_rows, _signed_take, product)


def _signed_rows(held: Mapping[str, Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return (held["weight"][start:stop].float() * held["scale"][start:stop, None].float()).to(dtype)


def _signed_take(held: Mapping[str, Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
    return (held["weight"][index].float() * held["scale"][index, None].float()).to(dtype)


def _bytes_by_bytes(shape: tuple[int, int], reading: Reading) -> Way:
    """Activations quantised a token at a time, then an integer product: `torch._int_mm`. Any float dtype."""

    def hold(codes: Codes) -> Held:
        signed = codes.codes_OI.to(torch.int16).sub_(128).to(torch.int8)
        return {"weight": signed, "scale": codes.step.scale_G1.reshape(-1).float()}

    def product(x_TI: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        if not x_TI.shape[0]:
            return x_TI.new_empty(0, shape[0])
        rounded = reading.codes(x_TI)
        sums_TO = torch._int_mm(rounded.z_TI.to(torch.int8), held["weight"].t())
        return sums_TO.float().mul_(rounded.step.scale_G1).mul_(held["scale"]).to(x_TI.dtype)

    return Way("int8 x int8", hold, _signed_rows, _signed_take, product)


def quantised_inputs(plain: Way, reading: Reading) -> Way:
    """Activations through their transform, their codes and back, then the way of the weights alone."""
    return replace(
        plain,
        name=f"{plain.name}, {reading.name} inputs simulated",
        product=lambda x_TI, held: plain.product(reading.simulate(x_TI), held),
    )


def _int4(fmt: Format, shape: tuple[int, int], size: int) -> Way:
    """torch's `_weight_int4pack_mm_for_cpu`: w = (code − 8) · scale + zero, in groups of `size`."""
    rows_, columns = shape
    groups = columns // size

    def hold(codes: Codes) -> Held:
        scale_ON = codes.step.scale_G1.reshape(rows_, -1)
        zero_ON = torch.zeros_like(scale_ON)
        if codes.step.zero_G1 is not None:
            zero_ON = scale_ON * (8.0 - codes.step.zero_G1.reshape(rows_, -1))
        steps = torch.stack([scale_ON, zero_ON], dim=-1).repeat_interleave(groups // scale_ON.shape[1], dim=1)
        steps_NO2 = steps.transpose(0, 1).to(torch.bfloat16).contiguous()
        return {"packed": int4.convert(codes.codes_OI), "steps": steps_NO2}

    def decode(codes_OI: Tensor, steps_NO2: Tensor, dtype: torch.dtype) -> Tensor:
        scale_ON1, zero_ON1 = steps_NO2.to(dtype).permute(2, 1, 0).contiguous().unsqueeze(-1)
        z_ONK = codes_OI.view(-1, groups, size).to(dtype).sub_(8)
        return z_ONK.mul_(scale_ON1).add_(zero_ON1).view(-1, columns)

    def rows(held: Mapping[str, Tensor], start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return decode(int4.rows(held["packed"], shape, start, stop), held["steps"][:, start:stop], dtype)

    def take(held: Mapping[str, Tensor], index: Tensor, dtype: torch.dtype) -> Tensor:
        return decode(int4.take(held["packed"], shape, index), held["steps"][:, index], dtype)

    def product(x_TI: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        if x_TI.shape[0] <= 4 * FEW and x_TI.dtype == torch.bfloat16:
            return int4.product(x_TI, held["packed"], size, held["steps"])
        out_TO = x_TI.new_empty(x_TI.shape[0], rows_)
        for start, stop, z_IO in int4.columns(held["packed"], shape, x_TI.dtype):
            scale_N1O, zero_N1O = held["steps"][:, start:stop].permute(2, 0, 1).contiguous().unsqueeze(2)
            w_NKO = z_IO.view(groups, size, stop - start).mul_(scale_N1O)
            if fmt.grid.symmetric:
                out_TO[:, start:stop] = x_TI @ z_IO
            else:
                out_TO[:, start:stop] = x_TI @ w_NKO.add_(zero_N1O).view(columns, stop - start)
        return out_TO

    return Way("int4", hold, rows, take, product)
