"""torch's int4 kernel for CPUs, and its layout read back.

Rows are laid in blocks of `size` (64 with AVX-512, 32 with AVX2, 16 without). A block holds, column after column,
half as many bytes as it has rows; which nibble is which row depends on the machine and on the length of the block (the
last one may be shorter), so it is read off a probe whose codes spell the number of their row.

Legend: O rows, I columns, n rows asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor


def convert(codes_OI: Integer[Tensor, "O I"]) -> UInt8[Tensor, ...]:
    """Codes 0 … 15 in torch's layout, half a byte each. O divides by 16, I by 2."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.to(torch.int32), 1)
    return packed


def product(
    x_TI: Float[Tensor, "T I"], packed: UInt8[Tensor, ...], size: int, steps_NO2: Float[Tensor, "N O 2"]
) -> Float[Tensor, "T O"]:
    """x Wᵀ with w = (code − 8) · step[0] + step[1] in groups of `size` columns; bfloat16 alone is fast."""
    y_TO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TI, packed, size, steps_NO2)
    return y_TO


@lru_cache
def _order(rows: int) -> Tensor:
    """(2, rows / 2): the row of each low nibble and of each high one, in a block of `rows` rows."""
    numbers = torch.arange(rows, dtype=torch.int64, device="cpu").unsqueeze(1).expand(rows, 2).contiguous()
    order = torch.zeros(2, rows // 2, dtype=torch.int64, device="cpu")
    for digit in (0, 1):
        flat = convert((numbers >> (4 * digit)) & 15).reshape(-1)[: rows // 2]
        order += torch.stack([flat & 15, flat >> 4]).long() << (4 * digit)
    return order


@lru_cache
def block_size() -> int:
    """Rows of a whole block here; 0 where this torch lays codes out in a way we cannot read back."""
    codes_OI = torch.randint(16, (208, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")
    packed = convert(codes_OI)
    for size in (64, 32, 16):
        if torch.equal(_read(packed, (208, 6), 0, 208, size), codes_OI.to(torch.uint8)):
            return size
    return 0


def usable() -> bool:
    """Whether the kernel's layout is one that we can read back."""
    return block_size() > 0


def rows(
    packed: UInt8[Tensor, ...], shape: tuple[int, int], start: int, stop: int
) -> UInt8[Tensor, "{stop-start} {shape[1]}"]:
    """Codes of rows [start, stop), uint8."""
    return _read(packed, shape, start, stop, block_size())


def _read(packed: Tensor, shape: tuple[int, int], start: int, stop: int, size: int) -> Tensor:
    total, columns = shape
    flat, pieces = packed.reshape(-1), []
    for begin in range(start // size * size, stop, size):
        count = min(size, total - begin)
        block = flat[begin * columns // 2 :][: count * columns // 2].view(columns, count // 2)
        order, codes = _order(count), torch.empty(count, columns, dtype=torch.uint8, device="cpu")
        codes[order[0]] = (block & 15).t()
        codes[order[1]] = (block >> 4).t()
        pieces.append(codes)
    offset = start % size
    return torch.cat(pieces)[offset : offset + stop - start]


def columns(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Codes less 8, block by block and turned: first row, last, (I, n) in a float dtype."""
    total, width = shape
    flat, size = packed.reshape(-1), block_size()
    for start in range(0, total, size):
        count = min(size, total - start)
        half = count // 2
        block = flat[start * width // 2 :][: count * width // 2].view(width, half)
        z_In = torch.empty(width, count, dtype=dtype, device="cpu")
        z_In[:, :half] = block & 15
        z_In[:, half:] = block >> 4
        order = _order(count).reshape(-1)
        if not torch.equal(order, torch.arange(count, dtype=torch.int64, device="cpu")):
            z_In = z_In[:, torch.argsort(order)]
        yield start, start + count, z_In.sub_(8)


def take(
    packed: UInt8[Tensor, ...], shape: tuple[int, int], index: Integer[Tensor, " n"]
) -> UInt8[Tensor, "n {shape[1]}"]:
    """Codes of some rows (n, I), uint8: only their bytes are touched."""
    total, columns = shape
    size = block_size()
    places = torch.empty(total, 3, dtype=torch.int64, device="cpu")  # first byte, bytes to the next column, shift
    for count, first, last in _runs(total, size):
        order = _order(count)
        byte_of = torch.empty(count, dtype=torch.int64, device="cpu").index_put_((order.reshape(-1),), _numbers(count))
        shift_of = torch.zeros(count, dtype=torch.int64, device="cpu")
        shift_of[order[1]] = 4
        begin = torch.arange(first, last, count, dtype=torch.int64, device="cpu").repeat_interleave(count)
        repeats = (last - first) // count
        places[first:last, 0] = begin * columns // 2 + byte_of.repeat(repeats)
        places[first:last, 1] = count // 2
        places[first:last, 2] = shift_of.repeat(repeats)
    chosen = places[index]
    at = chosen[:, :1] + torch.arange(columns, dtype=torch.int64, device="cpu") * chosen[:, 1:2]
    return (packed.reshape(-1)[at] >> chosen[:, 2:].to(torch.uint8)) & 15


def _numbers(count: int) -> Tensor:
    """Place in its column of each nibble of a block, low ones first."""
    return torch.arange(count // 2, dtype=torch.int64, device="cpu").repeat(2)


def _runs(total: int, size: int) -> list[tuple[int, int, int]]:
    """(rows a block, first row, last row) of the whole blocks, and of the shorter last one."""
    whole = total // size * size
    runs = [(size, 0, whole)] if whole else []
    return runs + ([(total - whole, whole, total)] if total > whole else [])
