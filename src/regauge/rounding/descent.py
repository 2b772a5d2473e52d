"""Codes that have several levels, changed one input after the other as long as that lowers the errors of all of them.

A sweep from the first column to the last never comes back, and what was good for a level then is not once the others
have had their say. Here each column is looked at again while all the others stay: of a code's candidates (for each
level the one in the cell that would be best for it alone, and the code as it is) the one is taken that costs least.

Legend: O output channels, I input channels, B columns of a block, K levels, R rows at a time, C candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regauge.formats.base import Format, Step
from regauge.formats.planes import level_step
from regauge.formats.prefixes import FEWEST
from regauge.rounding.level_steps import along

ROWS, BLOCK = 512, 64
"""Rows at a time, and columns whose changes reach the others at once."""


def descended(w_OI: Tensor, codes_OI: Tensor, fmt: Format, weights: Mapping[int, float], hessian_II: Tensor) -> Tensor:
    """codes_OI after one pass over the columns, those of the largest inputs first.

    Args:
        fmt: with the step of the whole, and what levels make of it.
        weights: bits → what an error counts, in cells of that level, squared.
        hessian_II: of the inputs, damped, so that its diagonal is above 0.

    Never worse in the sum of the errors so weighted, but for rounding.
    Cost: 2 K · O · I² multiply-adds.
    """
    step, columns = fmt.step, w_OI.shape[1]
    assert step is not None, "codes have steps"
    span = fmt.grain.span((w_OI.shape[0], columns))
    group_I = torch.arange(columns, dtype=torch.int64, device=w_OI.device) // span
    top, levels = fmt.grid.bits, tuple(weights)
    rows = w_OI.shape[0]
    steps = [step if bits == top else level_step(step, fmt, bits) for bits in levels]
    scale_KON = torch.stack([along(one.scale_G1, rows) for one in steps])
    low_KON = torch.stack([along(_low(one), rows) for one in steps])
    wide_K = torch.tensor([2.0 ** (top - bits) for bits in levels], dtype=torch.float32, device=w_OI.device)
    weight_K = torch.tensor(list(weights.values()), dtype=torch.float32, device=w_OI.device)
    found_OI = torch.empty_like(codes_OI)
    order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    ordered_II = hessian_II[order_I][:, order_I]
    group_I = group_I[order_I]
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        values = tuple(one_KON[:, part].permute(2, 0, 1)[group_I] for one_KON in (scale_KON, low_KON))
        codes_IR = codes_OI[part].T[order_I].float()
        _pass(w_OI[part].T[order_I], codes_IR, values, wide_K, weight_K, ordered_II)
        found_OI[part, order_I] = codes_IR.T.to(torch.uint8)
    return found_OI


def _low(step: Step) -> Tensor:
    assert step.zero_G1 is not None, "a nested grid has a zero point"
    return -step.zero_G1 * step.scale_G1


def _pass(
    w_IR: Tensor,
    codes_IR: Tensor,
    values: tuple[Tensor, ...],
    wide_K: Tensor,
    weight_K: Tensor,
    hessian_II: Tensor,
) -> None:
    """Changes the codes of some rows in place. All in the order of the pass.

    Args:
        codes_IR: whole numbers in float32.
        values: of each weight and level, (I, K, R), step and value of code 0.
        wide_K: codes of a cell; the last level is the whole, whose cells are codes.
    """
    scale_IKR, low_IKR = values
    columns, wide_K1 = w_IR.shape[0], wide_K[:, None]
    last_K1 = (wide_K[:1] * (1 << FEWEST) / wide_K)[:, None] - 1
    error_IKR = w_IR[:, None] - (codes_IR[:, None] / wide_K1).floor_().mul_(scale_IKR).add_(low_IKR)
    slope_IKR = (hessian_II @ error_IKR.flatten(1)).view(error_IKR.shape)
    diagonal, weight_1K = hessian_II.diagonal().tolist(), weight_K[None]
    for start in range(0, columns, BLOCK):
        block = slice(start, start + BLOCK)
        own_BB, slope_BKR = hessian_II[block, block], slope_IKR[block].clone()
        before_BKR = error_IKR[block].clone()
        for column in range(start, min(start + BLOCK, columns)):
            place = column - start
            w_R, scale_KR, low_KR, was_KR = w_IR[column], scale_IKR[column], low_IKR[column], error_IKR[column]
            # The value that is best for each level, all the others staying, counted in cells.
            z_KR = (slope_BKR[place] / diagonal[column]).sub_(was_KR).add_(w_R).sub_(low_KR).div_(scale_KR)
            first_KR = torch.minimum(z_KR.round().clamp_(min=0), last_K1).mul_(wide_K1)
            tried_KR = torch.minimum(torch.maximum(z_KR[-1].round(), first_KR), first_KR + (wide_K1 - 1))
            tried_CR = torch.cat([tried_KR, codes_IR[column, None]])
            gap_CKR = (tried_CR[:, None] / wide_K1).floor_().sub_(z_KR).square_()
            best_1R = (weight_1K @ gap_CKR).squeeze(1).argmin(0, keepdim=True)
            codes_IR[column] = code_R = tried_CR.gather(0, best_1R)[0]
            now_KR = w_R - (code_R / wide_K1).floor_().mul_(scale_KR).add_(low_KR)
            slope_BKR[place + 1 :].addcmul_(own_BB[place + 1 :, place, None, None], now_KR - was_KR)
            error_IKR[column] = now_KR
        changed_BKR = error_IKR[block] - before_BKR
        slope_IKR += (hessian_II[:, block] @ changed_BKR.flatten(1)).view(slope_IKR.shape)
