"""Steps and values of code 0 of each level of a nested grid, refitted to codes that are known.

Legend: O output channels, I input channels, N groups along a row, R rows at a time, S inputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.formats.base import Format, Step
from regauge.formats.planes import LEVELS, MIDDLE, SHIFT, STRETCH, Float16Levels, cells
from regauge.formats.prefixes import FEWEST

ROOM = 1 << 23
"""Numbers that a refit holds at a time."""


def refitted(w_OI: Tensor, codes_OI: Tensor, fmt: Format, step: Step, hessian_II: Tensor) -> Step:
    """The step with the bytes of its levels fitted; as it is where it has none.

    Args:
        hessian_II: damped, so that every group has some weight.
    """
    count = fmt.scale.count if isinstance(fmt.scale, Float16Levels) else 0
    if not count:
        return step
    levels = [
        _refitted(w_OI, codes_OI, fmt, step, FEWEST + index, hessian_II)
        if FEWEST + index < fmt.grid.bits
        else torch.full(step.scale_G1.shape, MIDDLE * 17, dtype=torch.uint8, device=w_OI.device)
        for index in range(count)
    ]
    return fmt.load({**step.fields, LEVELS: torch.cat(levels, 1).reshape(-1)})


def along(field_G1: Tensor, rows: int) -> Tensor:
    """(G, 1) → (O, N)."""
    return field_G1.expand(rows, 1) if field_G1.numel() == 1 else field_G1.reshape(rows, -1)


def _refitted(w_OI: Tensor, codes_OI: Tensor, fmt: Format, step: Step, bits: int, hessian_II: Tensor) -> Tensor:
    """The byte of each group (G, 1) of a level: stretches and shifts of the groups of a row that leave it least error.

    With basis columns u (a step of stretch) and v (a step of shift) for each group the error is a quadratic form of
    their counts: it is solved for real ones, and these are rounded one after the other, each paying for those before.
    """
    rows, columns = w_OI.shape
    scale_G1, low_G1 = cells(step, fmt.grid.bits, bits)
    scale_RN, low_RN = along(scale_G1, rows), along(low_G1, rows)
    groups = scale_RN.shape[1]
    span = columns // groups
    h_II = hessian_II / hessian_II.diagonal().mean()
    ones_NN = h_II.view(groups, span, groups, span).sum((1, 3))
    found = []
    whole = (torch.zeros(1, dtype=torch.float64, device=w_OI.device),) * 2
    some = max(1, ROOM // (groups * columns))
    for start in range(0, rows, some):
        part = slice(start, start + some)
        wide_RN1, low_RN1 = scale_RN[part, :, None], low_RN[part, :, None]
        q_RNS = (codes_OI[part] >> (fmt.grid.bits - bits)).float().view(-1, groups, span)
        left_RI = w_OI[part] - (q_RNS * wide_RN1 + low_RN1).flatten(1)
        count = len(left_RI)
        u_RNS = (q_RNS - ((1 << bits) - 1) / 2) * (wide_RN1 * (STRETCH / 2 ** (bits - FEWEST)))
        v_RN = wide_RN1[:, :, 0] * SHIFT
        uh_RNI = torch.einsum("rns,nsi->rni", u_RNS, h_II.view(groups, span, columns))
        a = torch.empty(count, groups, 2, groups, 2, dtype=torch.float64, device=w_OI.device)
        by_RNNS = uh_RNI.view(count, groups, groups, span)
        a[:, :, 0, :, 0] = (by_RNNS * u_RNS[:, None]).sum(3).double()
        a[:, :, 0, :, 1] = (by_RNNS.sum(3) * v_RN[:, None]).double()
        a[:, :, 1, :, 0] = a[:, :, 0, :, 1].transpose(1, 2)
        a[:, :, 1, :, 1] = (ones_NN * v_RN[:, :, None] * v_RN[:, None]).double()
        hl_RNS = (left_RI @ h_II).view(count, groups, span)
        b = torch.stack([(hl_RNS * u_RNS).sum(2), hl_RNS.sum(2) * v_RN], 2).double().flatten(1)
        a = a.reshape(count, 2 * groups, 2 * groups)
        if scale_G1.numel() == 1:  # one group for all rows, whose errors are added up
            whole = whole[0] + a.sum(0, keepdim=True), whole[1] + b.sum(0, keepdim=True)
        else:
            found.append(_integers(a, b))
    if not found:
        found.append(_integers(*whole))
    counts_RN2 = torch.cat(found).view(-1, groups, 2) + MIDDLE
    return (counts_RN2[:, :, 0] * 16 + counts_RN2[:, :, 1]).to(torch.uint8).reshape(-1, 1)


def _integers(a_Rnn: Tensor, b_Rn: Tensor) -> Tensor:
    """Whole x from −8 to 7 with little x A x − 2 b x."""
    size = a_Rnn.shape[1]
    ridge_R = 1e-6 * a_Rnn.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    eye = torch.eye(size, dtype=torch.float64, device=a_Rnn.device)
    lower_Rnn, _ = torch.linalg.cholesky_ex(a_Rnn + ridge_R[:, None, None] * eye)
    y_Rn = torch.linalg.solve_triangular(lower_Rnn, b_Rn[:, :, None], upper=False)[:, :, 0]
    x_Rn = torch.zeros_like(b_Rn)
    for index in reversed(range(size)):  # A = L Lᵀ and Lᵀ x = y, from the last on
        rest_R = y_Rn[:, index] - (lower_Rnn[:, index + 1 :, index] * x_Rn[:, index + 1 :]).sum(1)
        best_R = (rest_R / lower_Rnn[:, index, index]).nan_to_num(0.0)
        x_Rn[:, index] = best_R.round().clamp(-MIDDLE, MIDDLE - 1)
    return x_Rn.int()
