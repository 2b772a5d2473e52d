"""The table of kernels: what each multiplies. Data alone; `capabilities.py` asks it, and says how to add a line.

Legend: O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from regauge.formats.base import Grid
from regauge.kernels.cpu.layout import unit

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
"""Kinds of device that the runtime has kernels for."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Read:
    """How the inputs of a matrix are rounded.

    Attributes:
        grain: which elements share a step.
        static: whether the step is stored, not taken from each call's own values.
        transform: what the inputs are multiplied by first.
        clipped: whether a share of each call's range is taken.
    """

    grid: Grid
    grain: str = "token"
    static: bool = False
    transform: str = "identity"
    clipped: bool = False


@dataclass(frozen=True)
class Row:
    """What one kernel multiplies. A field that a matrix does not meet is a reason, in the order of the fields.

    Attributes:
        device: `cpu` or `cuda`.
        kernel: its name; several rows may have one.
        library: what must be installed: the C++ kernels, `triton`, or nothing but torch.
        kind: of the weights' grid.
        bits: of a code.
        zeros: whether groups may have zero points.
        whole: whether codes must stand for whole multiples of one step that fit a byte.
        like: the dtype whose bytes the codes must be.
        group: bits → groups along a row are a multiple of so many inputs; empty: one step a row.
        groups: sizes that go besides.
        tensor: whether one step may serve the whole matrix.
        panels: whether rows are padded to panels, which must not cost much.
        rows, columns: O is a multiple of the one, I of the other; and I is `most` at most.
        inputs: kind of the inputs' grid; "" for inputs that are not rounded.
        input_bits: of a code of the inputs, which are symmetric and have a step a token, of each call's own values.
        dtypes: of the inputs and of the result.
        taps: whether inputs may also have zero points, stored steps, groups of channels and a transform: the native
            step rounds them itself, one token a sequence; with more tokens it is not native.
        coded: whether they may, where whole groups of a panel share a step: the kernel takes them as ready codes.
    """

    device: str
    kernel: str
    library: str
    kind: str
    bits: tuple[int, ...]
    zeros: bool = False
    whole: bool = False
    like: torch.dtype | None = None
    group: Mapping[int, int] | None = None
    groups: tuple[int, ...] = ()
    tensor: bool = True
    panels: bool = False
    rows: int = 1
    columns: int = 1
    most: int = 1 << 31
    inputs: str = ""
    input_bits: tuple[int, ...] = ()
    input_like: torch.dtype | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    taps: bool = False
    coded: bool = False


EVERY, TRELLISES = tuple(range(1, 9)), (2, 3, 4)
UNITS = {bits: unit(bits) for bits in EVERY}
EIGHTS = dict.fromkeys(EVERY, 8)
BYTES = tuple(range(2, 9))
"""Bits of signed integers that a byte holds."""
FLOATING = (4, 6, 8)
"""Bits of small floats."""
NATIVE, TRITON, TORCH, INT4 = "the library of C++ kernels", "triton", "torch", "a torch whose int4 layout is known"
PATHS = "a library of C++ kernels that has trellises"
CODED = "a library of C++ kernels that takes ready codes"
MOST = (1 << 17) - 1
"""Inputs whose products of bytes 32 bits surely hold."""

_PANELS, _STEP, _CODED = (CPU, "panels", NATIVE), (CPU, "step", NATIVE), (CPU, "panels", CODED)
ROWS: tuple[Row, ...] = (
    Row(*_PANELS, "integer", EVERY, zeros=True, group=UNITS, panels=True),
    Row(*_PANELS, "float", EVERY, group=UNITS, panels=True),
    Row(*_PANELS, "table", (1, 2, 3, 4), group=UNITS, panels=True),
    Row(CPU, "panels", PATHS, "trellis", TRELLISES, group=UNITS, panels=True),
    Row(*_PANELS, "integer", EVERY, zeros=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES),
    Row(CPU, "panels", PATHS, "trellis", TRELLISES, group=UNITS, panels=True, inputs="integer", input_bits=BYTES),
    Row(*_PANELS, "float", (2, 3, 4), whole=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES),
    Row(*_PANELS, "table", (1, 2, 3, 4), whole=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES),
    Row(*_CODED, "integer", EVERY, zeros=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES,
        coded=True),
    Row(*_CODED, "trellis", TRELLISES, group=UNITS, panels=True, inputs="integer", input_bits=BYTES, coded=True),
    Row(*_CODED, "float", (2, 3, 4), whole=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES,
        coded=True),
    Row(*_CODED, "table", (1, 2, 3, 4), whole=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES,
        coded=True),
    Row(*_STEP, "integer", EVERY, zeros=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES, taps=True),
    Row(*_STEP, "float", EVERY, group=UNITS, panels=True, inputs="integer", input_bits=BYTES, taps=True),
    Row(CPU, "step", PATHS, "trellis", TRELLISES, group=UNITS, panels=True, inputs="integer", input_bits=BYTES,
        taps=True),
    Row(*_STEP, "table", (1, 2, 3, 4), group=UNITS, panels=True, inputs="integer", input_bits=BYTES, taps=True),
    Row(*_STEP, "integer", EVERY, zeros=True, group=UNITS, panels=True, inputs="float", input_bits=FLOATING, taps=True),
    Row(*_STEP, "float", EVERY, group=UNITS, panels=True, inputs="float", input_bits=FLOATING, taps=True),
    Row(*_STEP, "table", (1, 2, 3, 4), group=UNITS, panels=True, inputs="float", input_bits=FLOATING, taps=True),
    Row(CPU, "int8 x int8", TORCH, "integer", (8,), tensor=False, inputs="integer", input_bits=(8,),
        dtypes=(*FLOATS, torch.float64)),
    Row(CPU, "int8", TORCH, "integer", (8,), tensor=False, dtypes=(torch.bfloat16,)),
    Row(CPU, "int4", INT4, "integer", (4,), zeros=True, group={4: 32}, tensor=False, rows=16, columns=32,
        dtypes=(torch.bfloat16,)),
    Row(CUDA, "fp8", TRITON, "float", (8,), like=E4M3, group={8: 128}, groups=(32, 64)),
    Row(CUDA, "linear", TRITON, "integer", EVERY, zeros=True, group=EIGHTS),
    Row(CUDA, "linear", TRITON, "float", EVERY, group=EIGHTS),
    Row(CUDA, "linear", TRITON, "table", EVERY, group=EIGHTS),
    Row(CUDA, "fp8", TRITON, "float", (8,), like=E4M3, group={8: 128}, groups=(32, 64), inputs="float",
        input_bits=(8,), input_like=E4M3),
    Row(CUDA, "w8a8", TRITON, "integer", (8,), most=MOST, inputs="integer", input_bits=BYTES),
    Row(CUDA, "w6a6", TRITON, "integer", (6,), most=MOST, inputs="integer", input_bits=BYTES),
    Row(CUDA, "packed_int", TRITON, "integer", (1, 2, 3, 4, 5, 7), most=MOST, inputs="integer", input_bits=BYTES),
)  # fmt: skip
"""Of several rows that fit, the first is taken: the faster one."""
