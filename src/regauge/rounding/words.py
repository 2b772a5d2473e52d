"""Error feedback where weights are rounded in words: neighbours whose codes stand for their values together.

Inside a word the columns cannot be rounded one by one, because each choice narrows the next. So a word is rounded
whole, to what its columns would best be were they free; then what its first columns lack is paid by the others, whose
path is found anew, and so on by parts of `PART` columns. Across words it is GPTQ's feedback (QuIP#'s block LDLQ, arXiv
2402.04396, with a block of one word; QTIP 2406.11235 does not pay within a block).

Legend: R rows, B columns of a block, N words of it, I input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.formats.base import Grid
from regauge.kernels.cpu import trellis

PART = 4
"""Columns rounded for good before the rest of their word is solved again."""


def falling(diagonal_I: Tensor, run: int) -> Tensor:
    """The order of columns by falling diagonal of the Hessian; of runs by their mean, each run as it lies."""
    if run == 1:
        return diagonal_I.argsort(descending=True, stable=True)
    first_N = diagonal_I.view(-1, run).mean(1).argsort(descending=True, stable=True) * run
    return (first_N[:, None] + torch.arange(run, dtype=torch.int64, device=first_N.device)).flatten()


def whole(block: int, run: int) -> int:
    """A block of whole words, of about so many columns."""
    return max(1, block // run) * run


def sweep(w_RB: Tensor, target_RB: Tensor, feedback_BB: Tensor, scale_RN: Tensor, grid: Grid) -> Tensor:
    """Codes (R, B) of a block; `w_RB`, a view, becomes its errors w − ŵ.

    Args:
        target_RB: what each column would round given the errors of all before the block.
        scale_RN: the step of each word.
    """
    paths = grid.paths
    if paths is None:
        return _listed(w_RB, target_RB, feedback_BB, scale_RN, grid)
    codes_RB = trellis.swept(w_RB, target_RB, feedback_BB, scale_RN, paths, PART)
    return _swept(w_RB, target_RB, feedback_BB, scale_RN, grid, paths) if codes_RB is None else codes_RB


def _listed(w_RB: Tensor, target_RB: Tensor, feedback_BB: Tensor, scale_RN: Tensor, grid: Grid) -> Tensor:
    """Words of a list: the nearest one to what the word would best be, each column's error counted by what it costs.

    With e = x − v the error costs e G eᵀ, G = F D² Fᵀ of the word's columns; its diagonal weighs.
    """
    codes_RB = torch.empty(w_RB.shape, dtype=torch.uint8, device=w_RB.device)
    target_RB = target_RB.clone()
    for word, start in enumerate(range(0, w_RB.shape[1], grid.run)):
        own = slice(start, start + grid.run)
        scale_R1 = scale_RN[:, word, None].to(w_RB.dtype)
        factor_CC = feedback_BB[own, own].triu(1) + torch.eye(grid.run, dtype=w_RB.dtype, device=w_RB.device)
        free_RC = w_RB[:, own] + torch.linalg.solve_triangular(
            factor_CC, target_RB[:, own] - w_RB[:, own], upper=True, left=False, unitriangular=True
        )
        z_RC = (free_RC / scale_R1).float()
        turned_CC = (factor_CC * feedback_BB[own, own].diagonal()).float()
        weight_C = turned_CC.square().sum(1)
        weight_C = weight_C / weight_C.mean().clamp(min=torch.finfo(torch.float32).tiny)
        found_RC = grid.near(z_RC, weight_C)
        codes_RB[:, own] = grid.encode(found_RC)
        w_RB[:, own] -= found_RC.to(w_RB.dtype) * scale_R1
        target_RB[:, own.stop :] += w_RB[:, own] @ feedback_BB[own, own.stop :]
    return codes_RB


def _swept(
    w_RB: Tensor, target_RB: Tensor, feedback_BB: Tensor, scale_RN: Tensor, grid: Grid, shape: trellis.Shape
) -> Tensor:
    """The definition, in torch."""
    run, last = shape.run, (1 << shape.window) - 1
    codes_RB = torch.empty(w_RB.shape, dtype=torch.uint8, device=w_RB.device)
    table = shape.table.to(w_RB.device)
    target_RB, weight_B = target_RB.clone(), feedback_BB.diagonal().float()
    for word, start in enumerate(range(0, w_RB.shape[1], run)):
        end, seam_R, state_R = start + run, None, None
        scale_R1 = scale_RN[:, word, None].to(w_RB.dtype)
        for first in range(start, end, PART):
            stop = min(first + PART, end)
            rest = slice(first, end)
            free_RC = w_RB[:, rest] + torch.linalg.solve_triangular(
                feedback_BB[rest, rest], target_RB[:, rest] - w_RB[:, rest], upper=True, left=False, unitriangular=True
            )
            z_RC = (free_RC / scale_R1).float()
            weight_C = weight_B[rest]
            if state_R is None:
                entry_RC = trellis.paths(z_RC, shape, weight_C)
            else:
                entry_RC = trellis.solved(z_RC, shape, state_R, seam_R, weight_C)
            if seam_R is None:
                seam_R = (entry_RC[:, -1] & last) >> shape.fresh
            entry_RC = entry_RC[:, : stop - first]
            state_R = (entry_RC[:, -1] & last) >> shape.fresh
            values_RC = table[entry_RC]
            codes_RB[:, first:stop] = grid.encode(values_RC)
            w_RB[:, first:stop] -= values_RC.to(w_RB.dtype) * scale_R1
            target_RB[:, stop:end] += w_RB[:, first:stop] @ feedback_BB[first:stop, stop:end]
        target_RB[:, end:] += w_RB[:, start:end] @ feedback_BB[start:end, end:]
    return codes_RB
