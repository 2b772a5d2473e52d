"""Decoding by table, a byte at a time: one look-up gives all the weights whose codes lie in that byte.

`torch.index_select` of one dimension copies whole elements, so the weights of a byte, viewed as one element of their
bytes, come at the price of one: 4M weights of 4 bits in 1 ms on one core, where indexing weight by weight takes 15.
Integers of 3, 5, 6 and 7 bits are held as planes of 4, 2 and 1 bits, none of which straddles a byte, and add up.

Legend: O output channels, I input channels, B bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from regauge.formats.base import Grid
from regauge.kernels.reference import pack

Planes = tuple[tuple[int, int], ...]
"""(bits, shift) of each plane, lowest first."""
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Bytes of the weights of one byte → a dtype of that size."""


def planes(grid: Grid) -> Planes:
    """How codes are held. One plane of all the bits where that is 2, 4 or 8 bits; () where look-ups do not apply."""
    if grid.kind == "trellis":  # a code says nothing without its neighbours
        return ()
    if grid.bits in (2, 4, 8):
        return ((grid.bits, 0),)
    if grid.kind != "integer":  # only integers add up plane by plane
        return ()
    found, shift = [], 0
    for bits in (4, 2, 1):
        if grid.bits & bits:
            found.append((bits, shift))
            shift += bits
    return tuple(found)


def divides(grid: Grid, columns: int) -> bool:
    """Whether rows of so many codes are whole bytes in every plane."""
    held = planes(grid)
    return bool(held) and all(columns * bits % 8 == 0 for bits, _ in held)


def split(codes_OI: Tensor, grid: Grid) -> list[Tensor]:
    """The planes of unpacked codes, each as packed rows."""
    return [pack((codes_OI >> shift) & ((1 << bits) - 1), bits) for bits, shift in planes(grid)]


def exact(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether every grid value is a number of this dtype."""
    values = grid.table.nan_to_num()
    return torch.equal(values.to(dtype).float(), values)


@lru_cache(maxsize=64)
def _table(grid: Grid, bits: int, shift: int, dtype: torch.dtype) -> Tensor:
    """256 entries: the values that a byte of this plane stands for, as one element."""
    byte, count = torch.arange(256, dtype=torch.int64, device="cpu"), 8 // bits
    codes = torch.stack([(byte >> (bits * place)) & ((1 << bits) - 1) for place in range(count)], dim=-1)
    values = torch.zeros(1 << grid.bits, dtype=torch.float32, device="cpu")
    values[: len(grid.table)] = grid.table.nan_to_num()
    found = values[codes << shift]
    if shift:
        found = found - values[0]  # the lowest plane brings the offset
    return found.to(dtype).contiguous().view(WORDS[count * dtype.itemsize]).reshape(-1)


def decode(held: Sequence[Tensor], grid: Grid, columns: int, dtype: torch.dtype) -> Tensor:
    """Grid values (O, I) of planes. `divides` must hold.

    Args:
        dtype: bfloat16 or float32; the values must be numbers of it (`exact`).
    """
    total: Tensor | None = None
    for (bits, shift), plane_OB in zip(planes(grid), held, strict=True):
        table = _table(grid, bits, shift, dtype).to(plane_OB.device)  # type: ignore[arg-type]  # grids are frozen
        found = torch.index_select(table, 0, plane_OB.reshape(-1).int()).view(dtype).view(plane_OB.shape[0], columns)
        total = found if total is None else total.add_(found)
    assert total is not None, "divides() holds"
    return total
