"""Error feedback by the C++ kernels, where they have what a format asks for; else torch computes (`rounders`).

Legend: O output channels, I input channels, G groups, K weights in a group, N groups along a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Step
from regauge.formats.numbers import zeroless
from regauge.kernels.cpu import sweep
from regauge.rounding.feedback import Factor


def swept(w_OI: Tensor, fmt: Format, step: Step | None, made: Factor, order_I: Tensor | None) -> Codes | None:
    """The codes by the C++ kernels; None where they do not have it, so that torch computes.

    That is: there is no library, another device, a sweep in float64, a part without a `kernel`, numbers that are not
    finite, or groups that are fitted when they are reached and hold several rows or, on a grid without 0, may be zeros.

    Args:
        step: where it is known; None: each group's is fitted when its first column is reached.
        order_I: in which columns are rounded; None: as they lie.
    """
    narrow = w_OI.dtype is made.feedback_II.dtype is torch.float32
    if not narrow or not w_OI.numel() or not sweep.has_sweep(w_OI, made.feedback_II) or fmt.grid.kernel is None:
        return None
    if step is None:
        return _fitting(w_OI, fmt, made)
    rows, columns = w_OI.shape
    span = fmt.grain.span((rows, columns))
    group_I = torch.arange(columns, dtype=torch.int32, device="cpu") // span
    if order_I is not None:
        w_OI, group_I = w_OI[:, order_I], group_I[order_I]
    scale_ON = _by_row(step.scale_G1, rows, columns // span)
    zero_ON = None if step.zero_G1 is None else _by_row(step.zero_G1, rows, columns // span)
    codes_OI = sweep.fed_back(w_OI, made.feedback_II, fmt.grid.kernel, scale_ON, zero_ON, group_I)
    if codes_OI is None:
        return None
    return Codes(codes_OI if order_I is None else codes_OI[:, order_I.argsort()], step)


def _by_row(step_G1: Tensor, rows: int, along: int) -> Tensor:
    """Steps of every row (O, N), also of groups that hold several rows."""
    step_GN = step_G1.float().view(-1, along)
    return step_GN.repeat_interleave(rows // step_GN.shape[0], 0).contiguous()


def _fitting(w_OI: Tensor, fmt: Format, made: Factor) -> Codes | None:
    shape = (w_OI.shape[0], w_OI.shape[1])
    span, (groups, size) = fmt.grain.span(shape), fmt.grain.groups(shape)
    fmt = fmt.bound(w_OI)
    any_G1 = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    kept = fmt.scale.bind(any_G1, fmt.grid, 1)  # a level that steps share is bound by now, the others read no steps
    values, found = fmt.grid.kernel, fmt.ranger.kernel
    if size != span or values is None or found is None or kept.kernel is None or zeroless(fmt.grid):
        return None
    made_of = sweep.fed_back_fitting(w_OI, made.feedback_II, values, found, kept.kernel, shape[1] // span)
    if made_of is None:
        return None
    codes_OI, scale_ON, zero_ON = made_of
    assert groups == scale_ON.numel(), "groups are numbered row by row"
    scale_G1, fields = kept.store(scale_ON.view(-1, 1))
    step = Step(scale_G1, None, fields)
    if zero_ON is not None:
        zero_G1 = zero_ON.view(-1, 1)
        step = replace(step, zero_G1=zero_G1, fields={**fields, "zero": fmt.grid.encode(zero_G1)})
    return Codes(codes_OI, step)
