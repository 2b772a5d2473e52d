"""Rounding by the C++ kernels: the steps of groups, and codes with error feedback.

The formulas are those of `formats/rangers.py` and `rounding/rounders.py`, which stay the reference; results differ by
the order of float32 sums. A row's codes depend on no other row and not on the number of threads. The interpreter's lock
is free meanwhile, so rounders on threads of their own run side by side.
Floor: O · I² / 2 multiply-adds of float32 for the feedback; K · 23 divisions a group of K for a search of 20 shrinks.
Legend: O output channels, I input channels, G groups, K weights in a group, N groups along a row.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.cpu import checks
from regauge.kernels.cpu.interface import kernels
from regauge.kernels.cpu.library import library

INTEGERS, FLOATS, LIST = range(3)
"""`rg_grid_kind`: what codes stand for."""
ABSMAX, MINMAX, SEARCH = range(3)
"""`rg_range_kind`: how the step of a group is found."""
F16, BF16, F32, E8M0, E4M3 = range(1, 6)
"""`rg_step_kind`: how the step of a group is stored."""
ENDLESS = 7
"""The answer of a kernel that met a number that is not finite."""


@dataclass(frozen=True)
class Values:
    """Which numbers exist.

    Attributes:
        kind: of `INTEGERS` (ties to even), `FLOATS` (ties to even) and `LIST` (ties to the lesser).
        bits: of a code.
        zero: groups have zero points.
        mantissa: bits of mantissa of `FLOATS`; tiny: their least normal value.
        values: of `LIST`, in rising order.
    """

    kind: int
    bits: int
    low: float
    high: float
    zero: bool = False
    mantissa: int = 0
    tiny: float = 1.0
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Stored:
    """How a step is stored.

    Attributes:
        kind: of `F16`, `BF16`, `F32`, `E8M0`, `E4M3`.
        top: of `E8M0`: the grid's greatest value over the power of two below it.
        strict: of `E8M0`: no larger power is taken where the greatest magnitude would round past the grid.
        whole: of `E4M3`: what steps are multiplied by before they are stored.
    """

    kind: int
    top: float = 1.0
    strict: bool = False
    whole: float = 1.0


@dataclass(frozen=True)
class Range:
    """How a step is found: a kind of `ABSMAX`, `MINMAX`, `SEARCH`, and the shrinks of a search, 1 first."""

    kind: int
    shares: tuple[float, ...] = ()


class _Grid(ctypes.Structure):
    """`rg_grid`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "middles")),
        *((name, ctypes.c_int32) for name in ("kind", "bits", "zero", "mantissa", "count")),
        *((name, ctypes.c_float) for name in ("low", "high", "tiny")),
    ]


class _Ranger(ctypes.Structure):
    """`rg_ranger`."""

    _fields_ = [
        ("shares", ctypes.c_void_p),
        ("top", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("kind", "count", "step", "strict")),
        ("whole", ctypes.c_float),
    ]


class _Sweep(ctypes.Structure):
    """`rg_sweep`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "feedback", "group_of", "ranger", "scale", "zero", "codes")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups")),
        ("grid", _Grid),
    ]


def has_sweep(*tensors: Tensor | None) -> bool:
    """Whether the kernels are here, and these tensors where they can read them."""
    return all(tensor is None or tensor.device.type == "cpu" for tensor in tensors) and library() is not None


def fitted(
    x_GK: Tensor, values: Values, found: Range, stored: Stored, weight_GK: Tensor | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """The step of each group and its zero point, each (G, 1) float32; None: a number is not finite.

    Args:
        x_GK: float32, bfloat16 or float16.
        weight_GK: float32, how much the error of each counts in a search.

    Raises:
        ValueError: other shapes or dtypes, or such values, ranges or steps as there are not.
        MemoryError: no room for 64 groups in float32.
    """
    groups, size = x_GK.shape
    x_GK, dtype = x_GK.detach().contiguous(), checks.number(x_GK.dtype)
    checks.tensor("weights", x_GK, checks.DTYPES, (groups, size))
    weight_GK = None if weight_GK is None else weight_GK.contiguous()
    checks.optional("how much errors count", weight_GK, (torch.float32,), (groups, size))
    grid, held = _grid(values)
    ranger, shares = _ranger(found, stored)
    scale_G1 = torch.empty(groups, 1, dtype=torch.float32, device="cpu")
    zero_G1 = torch.empty_like(scale_G1) if values.zero else None
    answer = kernels().rg_range(
        ctypes.byref(grid),
        ctypes.byref(ranger),
        x_GK.data_ptr(),
        dtype,
        _at(weight_GK),
        groups,
        size,
        scale_G1.data_ptr(),
        _at(zero_G1),
        torch.get_num_threads(),
    )
    del held, shares
    return (scale_G1, zero_G1) if _done(answer) else None


def fed_back(
    w_OI: Tensor, feedback_II: Tensor, values: Values, scale_ON: Tensor, zero_ON: Tensor | None, group_I: Tensor
) -> Tensor | None:
    """Codes (O, I) with error feedback where steps are known; None: a number is not finite.

    Args:
        w_OI: float32, columns in the order in which they are rounded.
        feedback_II: float32, upper triangular with a diagonal of 1; only what is above the diagonal is read.
        scale_ON: float32, the step of each row's groups; `zero_ON` their zero points where the values have them.
        group_I: int32, the group of each column.

    Raises:
        ValueError: other shapes or dtypes, or such values as there are not.
        MemoryError: no room for 64 rows in float32, or for 128 columns of the feedback.
    """
    rows, groups = w_OI.shape[0], scale_ON.shape[1]
    checks.tensor("steps", scale_ON, (torch.float32,), (rows, groups))
    checks.optional("zero points", zero_ON, (torch.float32,), (rows, groups))
    checks.tensor("groups of columns", group_I, (torch.int32,), (w_OI.shape[1],))
    if values.zero != (zero_ON is not None):
        raise ValueError("zero points are given where the values have them, and only there")
    return _swept(w_OI, feedback_II, values, (scale_ON, zero_ON), group_I, None)


def fed_back_fitting(
    w_OI: Tensor, feedback_II: Tensor, values: Values, found: Range, stored: Stored, groups: int
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Codes (O, I), steps and zero points (O, N), the step of a group fitted when its first column is reached.

    None: a number is not finite. Arguments and errors as those of `fed_back`.

    Args:
        groups: how many lie along a row, all equally long.
    """
    scale_ON = torch.empty(w_OI.shape[0], groups, dtype=torch.float32, device="cpu")
    zero_ON = torch.empty_like(scale_ON) if values.zero else None
    codes_OI = _swept(w_OI, feedback_II, values, (scale_ON, zero_ON), None, _ranger(found, stored))
    return None if codes_OI is None else (codes_OI, scale_ON, zero_ON)


def _swept(
    w_OI: Tensor,
    feedback_II: Tensor,
    values: Values,
    steps: tuple[Tensor, Tensor | None],
    group_I: Tensor | None,
    ranger: tuple[_Ranger, object] | None,
) -> Tensor | None:
    rows, columns = w_OI.shape
    w_OI, feedback_II = w_OI.detach().contiguous(), feedback_II.contiguous()
    checks.tensor("weights", w_OI, (torch.float32,), (rows, columns))
    checks.tensor("factors", feedback_II, (torch.float32,), (columns, columns))
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8, device="cpu")
    grid, kept = _grid(values)
    sweep = _Sweep(
        w_OI.data_ptr(),
        feedback_II.data_ptr(),
        _at(group_I),
        None if ranger is None else ctypes.addressof(ranger[0]),
        steps[0].data_ptr(),
        _at(steps[1]),
        codes_OI.data_ptr(),
        rows,
        columns,
        steps[0].shape[1],
        grid,
    )
    answer = kernels().rg_feedback(ctypes.byref(sweep), torch.get_num_threads())
    del kept, ranger
    return codes_OI if _done(answer) else None


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _grid(values: Values) -> tuple[_Grid, object]:
    """The C view of a grid, and what must outlive it."""
    count = len(values.values)
    listed = (ctypes.c_float * count)(*values.values)
    middles = [(low + high) / 2 for low, high in zip(values.values, values.values[1:], strict=False)]
    between = (ctypes.c_float * len(middles))(*middles)
    at = (ctypes.addressof(listed), ctypes.addressof(between)) if count else (None, None)
    plain = (values.kind, values.bits, int(values.zero), values.mantissa, count, values.low, values.high, values.tiny)
    return _Grid(*at, *plain), (listed, between)


def _ranger(found: Range, stored: Stored) -> tuple[_Ranger, object]:
    count = len(found.shares)
    shares = (ctypes.c_float * count)(*found.shares)
    at = ctypes.addressof(shares) if count else None
    return _Ranger(at, stored.top, found.kind, count, stored.kind, int(stored.strict), stored.whole), shares


def _done(answer: int) -> bool:
    if answer == 1:
        raise MemoryError("no memory to round 64 rows at a time in float32")
    if answer not in (0, ENDLESS):
        raise ValueError("the kernels do not round to such values, by such ranges or with such steps")
    return answer == 0
