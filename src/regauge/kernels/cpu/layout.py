"""How the panels of a matrix are laid out: sizes, groups, what a code and a step are. See `native/regauge.h`.

Legend: O output channels, I input channels, N groups along a row.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.cpu.interface import CUT_BITS, MOST_RUNS, PANEL, Struct, has, kernels

STEPS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.uint8: 4, torch.float8_e4m3fn: 5}
MOST_GROUP = 1 << 16
"""Inputs a group, whose sums of products then fit 32 bits."""
MOST_APART = 256
"""Inputs a group of a matrix whose bits lie apart."""
INT, TABLE, FLOAT, FULL, TRELLIS = 0, 1, 2, 3, 4
"""What a code stands for: see `rg_value_kind`."""


@dataclass(frozen=True)
class Value:
    """What codes stand for.

    Attributes:
        kind: INT: code − offset; where `bias` is the groups of a row, the bits of `mantissa`-bit codes lie apart.
            TABLE: table[code]. FLOAT: sign, exponent and `mantissa` bits, and the exponent less
            `bias`, without infinities. TRELLIS: windows of `mantissa` bits with `bias` plain ones; the last of `table`
            is what makes whole numbers of the others.
    """

    kind: int = INT
    offset: int = 0
    table: tuple[float, ...] = ()
    mantissa: int = 0
    bias: int = 0


def unit(bits: int) -> int:
    """Inputs in the smallest block of codes; a group is a multiple of it."""
    return 32 if bits & 1 else 16 if bits & 2 else 8 if bits & 4 else 4


def group_of(columns: int, bits: int, span: int, run: int = 1) -> int:
    """Inputs a group in panels, where `span` neighbouring inputs share a step; 0 where panels cannot say it. Groups are
    whole runs of `run` inputs.

    A span of whole rows is cut into groups of about 128, and long groups too, because activations are rounded a group
    at a time. The last group may be padded, and padding may cost 3 % of the codes at most where the matrix is large.
    """
    least = math.lcm(unit(bits), run)
    if span < columns:
        if span % least or columns % span:
            return 0
        short = next((size for size in (128, 96, 64) if span > 128 and span % size == 0 and size % least == 0), span)
        return short if short <= MOST_GROUP else 0
    sizes = [size for size in range(32, 161, 4) if size % least == 0]
    return min(sizes, key=lambda size: (-columns % size, abs(size - 128)))


def cuts_of(widths: Sequence[int], columns: int, group: int) -> tuple[int, ...]:
    """Groups at which a row of panels is cut into runs where its first inputs, in those numbers, are used alone too;
    none: all lie in one run.

    A core reads from so many places at once without waiting, so there are few cuts, and those of the fewest inputs come
    first: what a member loses that ends within a run is the same time, whatever it reads.
    """
    groups = -(-columns // group)
    cuts = sorted({-(-width // group) for width in widths} - {groups})
    if groups >> CUT_BITS or not has("rg_has_cuts"):
        return ()
    return tuple(cuts[: MOST_RUNS - 1])


def stride_of(rows: int, columns: int, group: int, cuts: Sequence[int]) -> int:
    """What `rg_matrix.stride` says of a matrix in runs; 0 of one in one run, and where there are too many rows."""
    panels, groups = -(-rows // PANEL), -(-columns // group)
    if not cuts or panels >> 63 - MOST_RUNS * CUT_BITS:
        return 0
    ends = (*cuts, *(groups,) * (MOST_RUNS - len(cuts)))
    return -(panels << MOST_RUNS * CUT_BITS | sum(end << place * CUT_BITS for place, end in enumerate(ends)))


def cut_at(stride: int = 0) -> tuple[int, ...]:
    """Where a matrix is cut, by its stride; none: one run."""
    ends = [-stride >> place * CUT_BITS & (1 << CUT_BITS) - 1 for place in range(MOST_RUNS)] if stride < 0 else [0]
    return tuple(end for end in ends[:-1] if end < ends[-1])


def meta_of(
    shape: tuple[int, int], bits: int, value: Value, group: int, scale_ON: Tensor | None, zero: bool
) -> tuple[int, ...]:
    """The integers of `META` for a matrix with such steps, with or without zero points.

    Raises:
        ValueError: steps are not kept in that dtype.
    """
    if scale_ON is not None and scale_ON.dtype not in STEPS:
        raise ValueError(f"steps are kept as {', '.join(map(str, STEPS))}, not {scale_ON.dtype}")
    step = 0 if scale_ON is None else STEPS[scale_ON.dtype]
    return (*shape, bits, group, step, int(zero), value.kind, value.offset, value.mantissa, value.bias)


def panel_bytes(meta: tuple[int, ...]) -> int:
    """Bytes of all panels of such a matrix; 0 where panels cannot hold it."""
    room = (ctypes.c_float * 16)()  # a table is only asked for, not read
    struct = Struct(0, 0, ctypes.addressof(room), *meta)
    return math.ceil(meta[0] / PANEL) * int(kernels().rg_panel_bytes(ctypes.byref(struct)))


def aligned(size: int) -> Tensor:
    """uint8 (size,), aligned to 64 bytes."""
    memory = torch.empty(size + 63, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % 64
    return memory[start : start + size]
