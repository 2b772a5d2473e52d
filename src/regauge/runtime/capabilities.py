"""What the runtime multiplies natively: one table, which the loader, `explain`, receipts and the search ask.

A product is *native* where a kernel reads the packed codes, and rounds the inputs itself where a recipe rounds them.
Everything else is *simulated*: weights are decoded to floats a block of rows at a time, or inputs go through their
codes and back before a product of floats. Results are the same to rounding; simulated ones gain memory and no speed.

To add a kernel: add its line to `ROWS`, and its way of holding a matrix to `runtime/matrices`. A test multiplies a
random matrix for every line, and asks the table about every format of the table of parts.

Legend: O output channels, I input channels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from regauge.errors import SettingError, nearest
from regauge.formats.base import Format, Grid
from regauge.kernels.cpu.layout import PANEL, group_of, unit
from regauge.kernels.cpu.library import available

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)
"""Kinds of device that the runtime has kernels for."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DECODED = "decoded"
"""The way of every format that no kernel reads."""
SMALL, PADDING = 64 << 10, 1.03
"""Panels may pad a matrix to so many times its codes, or to so many bytes."""
E4M3 = torch.float8_e4m3fn
Shape = tuple[int, int]


@dataclass(frozen=True)
class Read:
    """How the inputs of a matrix are rounded.

    Attributes:
        grain: which elements share a step.
        static: whether the step is stored, not taken from each call's own values.
        transform: what the inputs are multiplied by first.
    """

    grid: Grid
    grain: str = "token"
    static: bool = False
    transform: str = "identity"


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
        rows, columns: O is a multiple of the one; I is one of the other where that is not 0.
        inputs: kind of the inputs' grid; "" for inputs that are not rounded.
        input_bits: of a code of the inputs, which are symmetric and have a step a token, of each call's own values.
        dtypes: of the inputs and of the result.
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


EVERY = tuple(range(1, 9))
UNITS = {bits: unit(bits) for bits in EVERY}
EIGHTS = dict.fromkeys(EVERY, 8)
BYTES = tuple(range(2, 9))
"""Bits of signed integers that a byte holds."""
NATIVE, TRITON, TORCH = "the C++ kernels", "triton", "torch"
MOST = (1 << 17) - 1
"""Inputs whose products of bytes 32 bits surely hold."""

_PANELS = (CPU, "panels", NATIVE)
ROWS: tuple[Row, ...] = (
    Row(*_PANELS, "integer", EVERY, zeros=True, group=UNITS, panels=True),
    Row(*_PANELS, "float", EVERY, group=UNITS, panels=True),
    Row(*_PANELS, "table", (1, 2, 3, 4), group=UNITS, panels=True),
    Row(*_PANELS, "integer", EVERY, zeros=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES),
    Row(*_PANELS, "float", (2, 3, 4), whole=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES),
    Row(*_PANELS, "table", (1, 2, 3, 4), whole=True, group=UNITS, panels=True, inputs="integer", input_bits=BYTES),
    Row(CPU, "int8 x int8", TORCH, "integer", (8,), tensor=False, inputs="integer", input_bits=(8,),
        dtypes=(*FLOATS, torch.float64)),
    Row(CPU, "int8", TORCH, "integer", (8,), tensor=False, dtypes=(torch.bfloat16,)),
    Row(CPU, "int4", TORCH, "integer", (4,), zeros=True, group={4: 32}, tensor=False, rows=16, columns=32,
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


@dataclass(frozen=True)
class Answer:
    """How a matrix is multiplied.

    Attributes:
        kernel: of its weights: that of a row, or `DECODED`.
        why: why it is not native, as a clause; "" where it is.
        rounds: whether the kernel rounds the inputs; where it does not and a recipe wants it, they are simulated.
    """

    kernel: str
    why: str = ""
    rounds: bool = False

    @property
    def native(self) -> bool:
        return not self.why

    def __str__(self) -> str:
        return f"native ({self.kernel})" if self.native else f"simulated ({self.why})"


def ask(
    fmt: Format,
    shape: Shape,
    inputs: Read | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = CPU,
    here: bool = False,
) -> Answer:
    """How a matrix of this format and shape (O, I) is multiplied.

    Args:
        inputs: how its inputs are rounded; None: they are not.
        dtype: of the inputs.
        device: `cpu` or `cuda`.
        here: whether what is not installed here counts as absent; without it the answer is the same everywhere.

    Raises:
        SettingError: the runtime has no kernels for such a device.
    """
    if device not in DEVICES:
        raise SettingError(f"the runtime has no kernels for {device!r}{nearest(device, DEVICES)}")
    rows = [row for row in ROWS if row.device == device]
    fits, why = _first(rows, fmt, shape, inputs, dtype, here)
    if fits is not None:
        return Answer(fits.kernel, rounds=inputs is not None)
    if inputs is None:
        return Answer(DECODED, f"weights are decoded: {why}")
    plain, worse = _first(rows, fmt, shape, None, dtype, here)
    if plain is None:
        return Answer(DECODED, f"weights are decoded: {worse}")
    return Answer(plain.kernel, f"inputs are rounded before a product of floats: {why}")


def _first(
    rows: list[Row], fmt: Format, shape: Shape, inputs: Read | None, dtype: torch.dtype, here: bool
) -> tuple[Row | None, str]:
    """The first row that fits, or the reason of the one that came nearest."""
    nearest_yet, why = -1, "there is no such kernel"
    for row in rows:
        if bool(row.inputs) != (inputs is not None):
            continue
        for number, check in enumerate(CHECKS):
            told = check(row, fmt, shape, inputs)
            if told:
                break
        else:
            number = len(CHECKS)
            told = f"{row.kernel} does not take {_named(dtype)}" if dtype not in row.dtypes else ""
            told = told or (f"{row.library} is not installed" if here and not installed(row.library) else "")
            if not told:
                return row, ""
        if number > nearest_yet:
            nearest_yet, why = number, told
    return None, why


Check = Callable[[Row, Format, Shape, Read | None], str]


def _kind(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    return "" if fmt.grid.kind == row.kind else f"no kernel of {row.device} reads {fmt.grid.kind} codes"


def _bits(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    if fmt.grid.bits in row.bits and (row.like is None or is_like(fmt.grid, row.like)):
        return ""
    return f"no kernel of {row.device} reads {fmt.grid.name}" + (" with such inputs" if inputs else "")


def _inputs(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    if inputs is None:
        return ""
    if inputs.transform != "identity":
        return f"{row.kernel} does not apply {inputs.transform}"
    if inputs.static or inputs.grain != "token":
        return f"{row.kernel} takes inputs with a step of their own a token"
    grid = inputs.grid
    fits = grid.kind == row.inputs and grid.bits in row.input_bits and grid.symmetric
    if fits and (row.input_like is None or is_like(grid, row.input_like)):
        return ""
    return f"{row.kernel} does not round inputs to {grid.name} beside weights of {fmt.grid.name}"


def _zeros(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    return "" if fmt.grid.symmetric or row.zeros else f"{row.kernel} takes no zero points"


def _whole(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    return "" if not row.whole or is_whole(fmt.grid) else f"{fmt.grid.name} is not whole multiples of one step"


def _grain(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    span, groups = fmt.grain.span(shape), fmt.grain.groups(shape)[0]
    if groups == 1 and shape[0] != 1 and not row.tensor:
        return f"{row.kernel} takes a step a row, not one for the matrix"
    if groups not in (1, shape[0] * (shape[1] // max(span, 1))):
        return f"{row.kernel} takes no groups of several rows"
    if span >= shape[1] or span in row.groups:
        return ""
    multiple = (row.group or {}).get(fmt.grid.bits, 0)
    if multiple and span % multiple == 0 and shape[1] % span == 0:
        return ""
    return f"{row.kernel} takes {f'groups of a multiple of {multiple}' if multiple else 'a step a row'}, not of {span}"


def _shape(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    if not all(shape):
        return "the matrix is empty"
    if shape[0] % row.rows or shape[1] % row.columns or shape[1] > row.most:
        return f"{row.kernel} does not take {shape[0]} x {shape[1]}"
    if row.panels:
        group = group_of(shape[1], fmt.grid.bits, fmt.grain.span(shape))
        padded = (shape[0] + -shape[0] % PANEL) * (shape[1] + -shape[1] % group)
        if padded > PADDING * shape[0] * shape[1] and padded * fmt.grid.bits > 8 * SMALL:
            return f"panels would hold {padded / shape[0] / shape[1]:.2f} times its codes"
    return ""


CHECKS: tuple[Check, ...] = (_kind, _bits, _zeros, _whole, _inputs, _grain, _shape)


def installed(library: str) -> bool:
    """Whether a library of kernels is here."""
    if library == NATIVE:
        return available()
    return library == TORCH or importlib.util.find_spec(library) is not None


@lru_cache(maxsize=64)
def is_like(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether the codes of a grid are the bytes of a dtype; codes that are never written may differ."""
    seen = ~grid.table.isnan()
    table = torch.arange(1 << grid.bits).to(torch.uint8).view(dtype).float()
    return grid.bits == 8 and len(table) == len(seen) and torch.equal(table[seen], grid.table[seen])


@lru_cache(maxsize=64)
def is_whole(grid: Grid) -> bool:
    """Whether the values of a grid are integers of 8 bits after some power of two (fp4, ternary; not nf4)."""
    if grid.kind == "integer":
        return True
    table = grid.table.nan_to_num(0.0)
    return any(
        bool((table / step == (table / step).round()).all()) and bool((table.abs() / step <= 127).all())
        for step in (1, 0.5, 0.25, 0.125, 0.0625)
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
