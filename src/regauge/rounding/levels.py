"""Codes of a nested grid: every code is chosen for all levels at once, and then each level gets steps of its own.

A code rounded for 8 bits alone is at 2 to 7 bits what nearest rounding would be: GPTQ pays for an error with later
codes, and what it pays with is lost where the low bits are cut off. So every level pays for errors of its own here, and
a code is the one whose cells suit the levels best, each error counted in cells of its level.

Legend: O output channels, I input channels, B columns of a block, K levels, N groups along a row, R rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Step
from regauge.formats.planes import LEVELS, MIDDLE, SHIFT, STRETCH, Float16Levels, cells
from regauge.formats.prefixes import FEWEST
from regauge.rounding.base import Stats
from regauge.rounding.feedback import factor, shared

JOINT, TOP, SEED = "joint", "top", "seed"
GROWN = (JOINT, TOP, SEED)
ROWS, BLOCK = 512, 128
"""Rows and columns at a time: a block of targets of seven levels is 2 MB."""
ROOM = 1 << 23
"""Numbers that a refit holds at a time."""
HELD_FAST = 1e4
"""By how much more than the rest a seed counts."""


@dataclass(frozen=True)
class Levels:
    """Column by column, as GPTQ with the largest inputs first, for every level of a nested grid.

    Of the candidates (for each level the code in its best cell that suits the whole most) the one is taken whose
    errors, each squared in cells of its level and weighted, sum to the least. Then the steps and values of code 0 of
    each level are refitted jointly along a row, by least squares under the Hessian, and stored in its bytes.

    Attributes:
        grow: `joint`: all levels, as `tilt` says; `top`: the whole alone, levels are what is cut off it; `seed`: the
            level of `seed` bits first, as if it were alone.
        tilt: a level counts 2^tilt as much as one of a bit more. 0: all alike, in cells of their own.
        seed: bits.
        damp: share of the mean diagonal of the Hessian that is added to it.
        refit: whether the bytes of levels are fitted; else levels have the middles of cells.
    """

    grow: str = JOINT
    tilt: float = 0.5
    seed: int = 4
    damp: float = 0.01
    refit: bool = True

    def __post_init__(self) -> None:
        if self.grow not in GROWN:
            raise ValueError(f"levels grow by one of {', '.join(GROWN)}, not {self.grow!r}")
        if not 0 <= self.tilt <= 4 or self.damp < 0 or not FEWEST <= self.seed <= 8:
            raise ValueError(
                f"tilt is 0 to 4, damp 0 or more, the seed 2 to 8 bits, not {self.tilt}, {self.damp}, {self.seed}"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return len(self._weights(fmt.grid.bits))

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        if fmt.grid.coarsest is None:
            raise ValueError(f"codes of {fmt.grid.name} have no levels to be grown")
        hessian_II = stats["hessian"].to(w_OI.device, torch.float32)
        dead_I = ~(hessian_II.diagonal() > 0)
        if bool(dead_I.all()):
            return replace(fmt.encode(w_OI), notes=("no input reached it, so it was rounded to nearest",))
        notes = [f"{int(dead_I.sum())} of {len(dead_I)} inputs were always 0: their weights became 0"] * bool(
            dead_I.any()
        )
        w_OI = w_OI.float().masked_fill(dead_I, 0)
        step = fmt.fit(w_OI)
        order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
        how = (self.damp, "activation", 1, torch.float32, torch.float32)
        made = shared(stats["hessian"], how, lambda: factor(hessian_II.clone(), self.damp, order_I, torch.float32))
        codes_OI = _grown(w_OI, fmt, step, self._weights(fmt.grid.bits), made.feedback_II, order_I)
        count = fmt.scale.count if isinstance(fmt.scale, Float16Levels) and self.refit else 0
        if count:
            damp = self.damp * float(hessian_II.diagonal()[~dead_I].mean())
            damped_II = hessian_II + damp * torch.eye(len(dead_I), dtype=torch.float32, device=w_OI.device)
            levels = [
                _refitted(w_OI, codes_OI, fmt, step, FEWEST + index, damped_II)
                if FEWEST + index < fmt.grid.bits
                else torch.full(step.scale_G1.shape, MIDDLE * 17, dtype=torch.uint8, device=w_OI.device)
                for index in range(count)
            ]
            fields = {**step.fields, LEVELS: torch.cat(levels, 1).reshape(-1)}
            step = fmt.load(fields)
        return Codes(codes_OI, step, notes=(*notes, *made.notes))

    def _weights(self, top: int) -> dict[int, float]:
        """Bits → what an error of a cell counts."""
        if self.grow == TOP:
            return {top: 1.0}
        if self.grow == SEED:
            return {top: 1.0} | ({self.seed: HELD_FAST} if self.seed < top else {})
        return {bits: 2.0 ** (self.tilt * (top - bits)) for bits in range(FEWEST, top + 1)}


def _grown(
    w_OI: Tensor, fmt: Format, step: Step, weights: dict[int, float], feedback_II: Tensor, order_I: Tensor
) -> Tensor:
    """codes_OI."""
    rows, columns = shape = (w_OI.shape[0], w_OI.shape[1])
    assert step.zero_G1 is not None, "a nested grid has a zero point"
    span = fmt.grain.span(shape)
    group_I = (torch.arange(columns, dtype=torch.int64, device=w_OI.device) // span)[order_I]
    scale_ON = _along(step.scale_G1, rows)
    low_ON = _along(-step.zero_G1 * step.scale_G1, rows)
    top = fmt.grid.bits
    wide_K = torch.tensor([2.0 ** (top - bits) for bits in weights], dtype=torch.float32, device=w_OI.device)
    weight_K = torch.tensor(list(weights.values()), dtype=torch.float32, device=w_OI.device) / wide_K.square()
    codes_OI = torch.empty(shape, dtype=torch.uint8, device=w_OI.device)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        steps = scale_ON[part][:, group_I], low_ON[part][:, group_I]
        found_RI = _swept(w_OI[part][:, order_I], steps, wide_K, weight_K, feedback_II, (1 << top) - 1)
        codes_OI[part] = found_RI[:, order_I.argsort()]
    return codes_OI


def _swept(
    w_RI: Tensor, steps: tuple[Tensor, Tensor], wide_K: Tensor, weight_K: Tensor, feedback_II: Tensor, most: int
) -> Tensor:
    """Codes of some rows, columns in the order of the sweep.

    Args:
        steps: of each weight, step and value of code 0.
        wide_K: codes of a cell, rising; the last level is the whole, whose cells are codes.
        weight_K: what an error in codes, squared, counts.
        most: the greatest code.
    """
    rows, columns = w_RI.shape
    scale_RI, low_RI = steps
    error_KRI = torch.zeros(len(wide_K), rows, columns, dtype=torch.float32, device=w_RI.device)
    codes_RI = torch.empty(rows, columns, dtype=torch.uint8, device=w_RI.device)
    wide_K1, half_K1 = wide_K[:, None], (wide_K[:, None] - 1) / 2
    last_K1 = (most + 1) / wide_K1 - 1
    whole = int(wide_K.argmin())
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        target_KRB = w_RI[:, start:end] + error_KRI[:, :, :start] @ feedback_II[:start, start:end]
        for column in range(start, end):
            own_KR = target_KRB[:, :, column - start]
            if column > start:
                own_KR = own_KR + error_KRI[:, :, start:column] @ feedback_II[start:column, column]
            scale_R, low_R = scale_RI[:, column], low_RI[:, column]
            z_KR = (own_KR - low_R) / scale_R
            cell_KR = ((z_KR - half_K1) / wide_K1).round_().clamp_(min=0)
            first_KR = torch.minimum(cell_KR, last_K1) * wide_K1
            near_R = z_KR[whole].round()
            tried_KR = torch.minimum(torch.maximum(near_R, first_KR), first_KR + wide_K1 - 1)
            cost_KR = torch.zeros_like(z_KR)
            for level in range(len(wide_K)):
                wide = wide_K[level]
                value_KR = (tried_KR / wide).floor_() * wide + half_K1[level]
                cost_KR += weight_K[level] * (value_KR - z_KR[level]).square_()
            code_R = tried_KR.gather(0, cost_KR.argmin(0, keepdim=True))[0]
            codes_RI[:, column] = code_R.to(torch.uint8)
            value_KR = (code_R / wide_K1).floor_() * wide_K1 + half_K1
            error_KRI[:, :, column] = w_RI[:, column] - (value_KR * scale_R + low_R)
    return codes_RI


def _along(field_G1: Tensor, rows: int) -> Tensor:
    """(G, 1) → (O, N)."""
    return field_G1.expand(rows, 1) if field_G1.numel() == 1 else field_G1.reshape(rows, -1)


def _refitted(w_OI: Tensor, codes_OI: Tensor, fmt: Format, step: Step, bits: int, hessian_II: Tensor) -> Tensor:
    """The byte of each group (G, 1) of a level: stretches and shifts of the groups of a row that leave it least error.

    With basis columns u (a step of stretch) and v (a step of shift) for each group the error is a quadratic form of
    their counts: it is solved for real ones, and these are rounded one after the other, each paying for those before.
    """
    rows, columns = w_OI.shape
    scale_G1, low_G1 = cells(step, fmt.grid.bits, bits)
    scale_RN, low_RN = _along(scale_G1, rows), _along(low_G1, rows)
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
