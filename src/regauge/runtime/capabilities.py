"""What the runtime multiplies natively: one table, which the loader, `explain`, receipts and the search ask.

A product is *native* where a kernel reads the packed codes, and multiplies integers where a recipe rounds the inputs.
Everything else is *simulated*: weights are decoded to floats a block of rows at a time, or inputs go through their
codes and back before a product of floats. Results are the same to rounding; simulated ones gain memory and no speed.

To add a kernel: add its line to `rows.py`, and its way of holding a matrix to `runtime/matrices`. A test multiplies a
random matrix for every line, and asks the table about every format of the table of parts.

Legend: O output channels, I input channels.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from regauge import parts
from regauge.errors import SettingError, nearest
from regauge.formats.base import Format, Grid
from regauge.kernels.cpu import coded, trellis
from regauge.kernels.cpu.interface import PANEL
from regauge.kernels.cpu.layout import group_of
from regauge.kernels.cpu.library import available
from regauge.parts import Point
from regauge.runtime.matrices import int4
from regauge.runtime.rows import CODED, CPU, DEVICES, INT4, NATIVE, PATHS, ROWS, TORCH, Read, Row

DECODED = "decoded"
"""The way of every format that no kernel reads."""
SMALL, PADDING = 64 << 10, 1.03
"""Panels may pad a matrix to so many times its codes, or to so many bytes."""
STEPPED = "; native in the step of one token"
Shape = tuple[int, int]


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
    step: bool = False,
) -> Answer:
    """How a matrix of this format and shape (O, I) is multiplied.

    Args:
        inputs: how its inputs are rounded; None: they are not.
        dtype: of the inputs.
        device: `cpu` or `cuda`.
        here: whether what is not installed here counts as absent; without it the answer is the same everywhere.
        step: whether it is asked for the native step, of one token a sequence.

    Raises:
        SettingError: the runtime has no kernels for such a device.
    """
    if device not in DEVICES:
        raise SettingError(f"the runtime has no kernels for {device!r}{nearest(device, DEVICES)}")
    those = (row for row in ROWS if row.device == device and step >= row.taps and not (step and row.coded))
    rows = sorted(those, key=lambda row: not row.taps)
    fits, why = _first(rows, fmt, shape, inputs, dtype, here)
    if fits is not None:
        return Answer(fits.kernel, rounds=inputs is not None)
    if inputs is None:
        return Answer(DECODED, f"weights are decoded: {why}")
    plain, worse = _first(rows, fmt, shape, None, dtype, here)
    if plain is None:
        return Answer(DECODED, f"weights are decoded: {worse}")
    return Answer(plain.kernel, f"inputs are rounded before a product of floats: {why}")


def read_of(reading: Point | None) -> Read | None:
    """How inputs are rounded, from the point of their tap; None where they are not."""
    if reading is None:
        return None
    grid: Grid = parts.build("grid", reading.spec("grid"))
    ranger = reading.name("ranger")
    static, clipped = ranger not in ("", "dynamic", "learnt-reach"), ranger == "learnt-reach"
    grain = parts.build("grain", reading.spec("grain")).name if reading.name("grain") else "token"
    return Read(grid, grain, static, reading.name("transform") or "identity", clipped)


def runs(choice: Point, reading: Point | None, shape: Shape, convolved: bool = False) -> dict[str, str]:
    """How a site runs on each kind of device, for receipts and `explain`: device → `native (…)` or `simulated (…)`.

    Args:
        convolved: whether the matrix is that of a convolution.
    """
    if convolved:
        return dict.fromkeys(DEVICES, "simulated (weights are decoded: no kernel convolves codes)")
    fmt, read = parts.format_of(choice), read_of(reading)
    found = {device: ask(fmt, shape, read, device=device) for device in DEVICES}
    stepped = read is not None and not found[CPU].native and ask(fmt, shape, read, step=True).native
    return {device: f"{how}{STEPPED if stepped and device == CPU else ''}" for device, how in found.items()}


def keeps(point: Point) -> dict[str, str]:
    """How a cache by such a rule is read on each kind of device, for `explain`: device → `native (…)` or
    `simulated (…)`. Only the step of a few new tokens reads packed blocks; a prompt is read over decoded ones."""
    if point["merge"] is not None:
        return dict.fromkeys(DEVICES, "not yet: no store has two blocks share what they keep")
    if point["keys"] is None and point["values"] is None:
        return dict.fromkeys(DEVICES, "native (what stays is read as it came)")
    found = dict.fromkeys(DEVICES, "simulated (blocks are decoded at each call, which saves memory and no time)")
    return found | {CPU: "native (the step of one token reads the packed blocks)"}


def _first(
    rows: list[Row], fmt: Format, shape: Shape, inputs: Read | None, dtype: torch.dtype, here: bool
) -> tuple[Row | None, str]:
    """The first row that fits, or the reason of the one that came nearest."""
    nearest_yet, why = -1, "there is no such kernel"
    for row in rows:
        if bool(row.inputs) != (inputs is not None):
            continue
        met, told = _met(row, fmt, shape, inputs)
        if not told and dtype not in row.dtypes:
            told = f"{row.kernel} does not take {_named(dtype)}"
        elif not told and here and not installed(row.library):
            told = f"{row.library} is not installed"
        if not told:
            return row, ""
        if met > nearest_yet:
            nearest_yet, why = met, told
    return None, why


def _met(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> tuple[int, str]:
    """How many checks a matrix meets, and why not the next."""
    for number, check in enumerate(CHECKS):
        if told := check(row, fmt, shape, inputs):
            return number, told
    return len(CHECKS), ""


Check = Callable[[Row, Format, Shape, Read | None], str]


def _kind(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    return "" if fmt.grid.kind == row.kind else f"no kernel of {row.device} reads {fmt.grid.kind} codes"


def _bits(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    if fmt.grid.bits in row.bits and (row.like is None or is_like(fmt.grid, row.like)):
        return ""
    return f"no kernel of {row.device} reads {fmt.grid.name}" + (" with rounded inputs" if inputs else "")


def _inputs(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    if inputs is None:
        return ""
    grid, grain, more = inputs.grid, inputs.grain.partition(":")[0], row.taps or row.coded
    if inputs.transform != "identity" and not more:
        return f"{row.kernel} does not apply {inputs.transform}"
    if inputs.clipped and not more:
        return f"{row.kernel} takes whole ranges of inputs, and these are clipped"
    if (inputs.static or grain != "token") and not more:
        return f"{row.kernel} takes inputs with a step of their own a token"
    if row.taps and grain not in (("token", "tensor", "group") if inputs.static else ("token", "group")):
        return f"{row.kernel} takes no {'stored' if inputs.static else 'dynamic'} steps of a {inputs.grain}"
    fits = grid.kind == row.inputs and grid.bits in row.input_bits and (grid.symmetric or more)
    if fits and (row.input_like is None or is_like(grid, row.input_like)):
        return ""
    return f"{row.kernel} does not round inputs to {grid.name} beside weights of {fmt.grid.name}"


def _shared(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    if inputs is None or not row.coded:
        return ""
    span = parts.build("grain", parts.read("grain", inputs.grain)).span(shape)
    size = group_of(shape[1], fmt.grid.bits, fmt.grain.span(shape), fmt.grid.run)
    if span >= shape[1] or (size and not span % size and not shape[1] % span):
        return ""
    return f"{row.kernel} sums {size} inputs as integers, and {span} of these share a step"


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
    multiple = math.lcm(multiple, fmt.grid.run)
    if multiple and span % multiple == 0 and shape[1] % span == 0:
        return ""
    return f"{row.kernel} takes {f'groups of a multiple of {multiple}' if multiple else 'a step a row'}, not of {span}"


def _shape(row: Row, fmt: Format, shape: Shape, inputs: Read | None) -> str:
    if not all(shape):
        return "the matrix is empty"
    if shape[0] % row.rows or shape[1] % row.columns or shape[1] > row.most:
        return f"{row.kernel} does not take {shape[0]} x {shape[1]}"
    if row.panels:
        group = group_of(shape[1], fmt.grid.bits, fmt.grain.span(shape), fmt.grid.run)
        padded = (shape[0] + -shape[0] % PANEL) * (shape[1] + -shape[1] % group)
        if padded > PADDING * shape[0] * shape[1] and padded * fmt.grid.bits > 8 * SMALL:
            return f"panels would hold {padded / shape[0] / shape[1]:.2f} times its codes"
    return ""


CHECKS: tuple[Check, ...] = (_kind, _bits, _zeros, _whole, _inputs, _shared, _grain, _shape)


def installed(library: str) -> bool:
    """Whether a library of kernels is here."""
    if library == NATIVE:
        return available()
    if library == INT4:
        return int4.usable()
    if library == PATHS:
        return available() and trellis.here()
    if library == CODED:
        return available() and coded.here()
    return library == TORCH or importlib.util.find_spec(library) is not None


def is_like(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether the codes of a grid are the bytes of a dtype; codes that are never written may differ."""
    return _is_like(grid, dtype)  # type: ignore[arg-type]  # grids are frozen


@lru_cache(maxsize=64)
def _is_like(grid: Grid, dtype: torch.dtype) -> bool:
    seen = ~grid.table.isnan()
    table = torch.arange(1 << grid.bits, dtype=torch.int64, device="cpu").to(torch.uint8).view(dtype).float()
    return grid.bits == 8 and len(table) == len(seen) and torch.equal(table[seen], grid.table[seen])


def is_whole(grid: Grid) -> bool:
    """Whether the values of a grid are integers of 8 bits after some power of two (fp4, ternary; not nf4)."""
    return _is_whole(grid)  # type: ignore[arg-type]  # grids are frozen


@lru_cache(maxsize=64)
def _is_whole(grid: Grid) -> bool:
    return grid.kind == "integer" or whole(grid.table.nan_to_num(0.0))


def whole(table: Tensor) -> bool:
    """The same of a table of values."""
    return any(
        bool((table / step == (table / step).round()).all()) and bool((table.abs() / step <= 127).all())
        for step in (1, 0.5, 0.25, 0.125, 0.0625)
    )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
