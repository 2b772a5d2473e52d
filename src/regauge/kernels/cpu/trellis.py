"""Rounding to a trellis: the least squared error over the paths of every word, by the C++ kernels or in torch.

What a trellis is: `formats/trellis.py` and `native/trellis.h`. Torch's way is the definition, and takes a hundred times
as long. Floor of the C++ one: four vector operations a row of 16 for each of 128 candidates, in each of two passes.

Legend: W words, R weights of a word, O output channels, I input channels, B columns at hand, N groups along them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.cpu import checks
from regauge.kernels.cpu.interface import has, kernels
from regauge.kernels.cpu.sweep import ENDLESS


@dataclass(frozen=True, eq=False)
class Shape:
    """What a trellis is made of.

    Attributes:
        table: float32 (2^(window + plain),), the value of every entry: plain bits, then the window.
        window: bits of a window.
        fresh: bits of it that are a weight's own: its highest.
        plain: bits beside it that no neighbour reads.
        run: weights of a word, whose fresh bits make a circle.
        unit: what makes whole numbers of the table's, of a signed byte.
    """

    table: Tensor
    window: int
    fresh: int
    plain: int
    run: int
    unit: float


class _Trellis(ctypes.Structure):
    """`rg_trellis`."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("window", "fresh", "plain", "run")),
    ]


class _Sweep(ctypes.Structure):
    """`rg_trellis_sweep`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "targets", "feedback", "scale", "codes")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups", "part", "w_pitch", "pitch", "codes_pitch")),
    ]


def here() -> bool:
    """Whether the C++ kernels find paths."""
    return has("rg_trellis_round")


def entries(codes_WR: Tensor, shape: Shape) -> Tensor:
    """The place in the table of every code of whole words, int64 (W, R)."""
    codes_WR = codes_WR.long()
    own_WR = codes_WR & ((1 << shape.fresh) - 1)
    found_WR = codes_WR >> shape.fresh << shape.window
    place, back = shape.window - shape.fresh, 0
    while place > -shape.fresh:
        before_WR = own_WR.roll(back, 1)
        found_WR |= before_WR << place if place >= 0 else before_WR >> -place
        place, back = place - shape.fresh, back + 1
    return found_WR


def snapped(z_WR: Tensor, shape: Shape) -> Tensor:
    """The values of the path nearest to z, of every word, float32 (W, R)."""
    z_WR = z_WR.detach().float()
    if z_WR.device.type != "cpu" or not here():
        return shape.table.to(z_WR.device)[paths(z_WR, shape)]
    z_WR, values_WR = z_WR.contiguous(), torch.empty_like(z_WR, memory_format=torch.contiguous_format)
    codes_WR = torch.empty(z_WR.shape, dtype=torch.uint8, device="cpu")
    view = _view(shape)
    answer = kernels().rg_trellis_round(
        ctypes.byref(view),
        z_WR.data_ptr(),
        *z_WR.shape,
        codes_WR.data_ptr(),
        values_WR.data_ptr(),
        torch.get_num_threads(),
    )
    return values_WR if _done(answer) else shape.table[paths(z_WR.nan_to_num(), shape)]


def swept(
    w_OB: Tensor, target_OB: Tensor, feedback_BB: Tensor, scale_ON: Tensor, shape: Shape, part: int
) -> Tensor | None:
    """Codes (O, B) of some columns with error feedback inside and between their words; `w_OB` becomes its errors.

    A word is rounded whole, to what its columns would best be were they free; then, `part` columns at a time, what the
    errors made so far owe is paid by the rest of the word, whose path is found anew.

    None: no kernels here, or a number is not finite, so that torch computes.

    Args:
        w_OB: float32, columns side by side, rows at any distance.
        target_OB: float32, what each would round given the errors of all columns before these.
        feedback_BB: float32, the factor's block of these columns, rows at any distance; its diagonal weighs errors.
        scale_ON: float32, steps.
    """
    if not here() or w_OB.device.type != "cpu" or w_OB.dtype is not torch.float32:
        return None
    rows, columns = w_OB.shape
    target_OB, scale_ON = target_OB.contiguous(), scale_ON.contiguous()
    checks.tensor("targets", target_OB, (torch.float32,), (rows, columns))
    checks.tensor("steps", scale_ON, (torch.float32,), (rows, None))
    for what, given in (("weights", w_OB), ("factors", feedback_BB)):
        if given.dtype is not torch.float32 or given.stride(1) != 1 or given.shape[1] != columns:
            raise ValueError(f"{what} are float32 with columns side by side, not {given.dtype} {given.stride()}")
    codes_OB = torch.empty(rows, columns, dtype=torch.uint8, device="cpu")
    sweep = _Sweep(
        *(given.data_ptr() for given in (w_OB, target_OB, feedback_BB, scale_ON, codes_OB)),
        rows,
        columns,
        scale_ON.shape[1],
        part,
        max(w_OB.stride(0), columns),
        max(feedback_BB.stride(0), columns),
        columns,
    )
    view = _view(shape)
    answer = kernels().rg_trellis_feedback(ctypes.byref(view), ctypes.byref(sweep), torch.get_num_threads())
    return codes_OB if _done(answer) else None


def _view(shape: Shape) -> _Trellis:
    return _Trellis(shape.table.data_ptr(), shape.window, shape.fresh, shape.plain, shape.run)


def _done(answer: int) -> bool:
    if answer == 1:
        raise MemoryError("no memory to round 16 rows at a time in float32")
    if answer not in (0, ENDLESS):
        raise ValueError("the kernels have no such trellis, or its words do not divide the columns")
    return answer == 0


def paths(z_WR: Tensor, shape: Shape, weight_R: Tensor | None = None) -> Tensor:
    """The entries of the path nearest to z, of every word, int64 (W, R): Viterbi's algorithm in two passes.

    First the word rolled by half, from any state to any; then from and to the state that it had at the seam.
    """
    half = shape.run // 2
    rolled_R = None if weight_R is None else weight_R.roll(-half)
    rolled_WR = solved(z_WR.roll(-half, 1), shape, None, None, rolled_R)
    seam_W = (rolled_WR[:, shape.run - half - 1] & ((1 << shape.window) - 1)) >> shape.fresh
    return solved(z_WR, shape, seam_W, seam_W, weight_R)


def solved(
    z_WR: Tensor, shape: Shape, start_W: Tensor | None, end_W: Tensor | None, weight_R: Tensor | None = None
) -> Tensor:
    """The entries of the path with the least squared error, from and to a state of each word (None: any).

    A state is a window without its own lowest `fresh` bits; R may be a part of a word.

    Args:
        weight_R: what the error of each weight is multiplied by before it is squared; None: 1.
    """
    count, size = z_WR.shape
    states = 1 << (shape.window - shape.fresh)
    windows = torch.arange(1 << shape.window, dtype=torch.int64, device=z_WR.device)
    table = shape.table.to(z_WR.device).view(1 << shape.plain, -1)
    cost_WS = torch.zeros(count, states, dtype=torch.float32, device=z_WR.device)
    if start_W is not None:
        cost_WS.fill_(torch.inf).scatter_(1, start_W[:, None], 0.0)
    back = []
    for column in range(size):
        gap = (z_WR[:, column, None, None] - table).square().amin(1)
        gap = gap if weight_R is None else gap * weight_R[column].square()
        cost = (cost_WS[:, windows & (states - 1)] + gap).view(count, states, -1)
        cost_WS, chosen = cost.min(2)
        back.append(chosen)
    at_W = cost_WS.argmin(1) if end_W is None else end_W
    found = []
    for column in reversed(range(size)):
        window_W = at_W << shape.fresh | back[column].gather(1, at_W[:, None])[:, 0]
        plain_W = (z_WR[:, column] - table[:, window_W]).square().argmin(0)
        found.append(plain_W << shape.window | window_W)
        at_W = window_W & (states - 1)
    return torch.stack(found[::-1], 1)
