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

from regauge.amounts import several, whole
from regauge.formats.base import Codes, Format, Step
from regauge.formats.prefixes import FEWEST
from regauge.rounding.base import Stats
from regauge.rounding.descent import descended
from regauge.rounding.feedback import factor, shared
from regauge.rounding.level_steps import along, refitted

JOINT, TOP, SEED, PLANES = "joint", "top", "seed", "planes"
GROWN = (JOINT, TOP, SEED, PLANES)
ROWS, BLOCK = 512, 128
"""Rows and columns at a time: a block of targets of seven levels is 2 MB."""
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
            level of `seed` bits first, as if it were alone; `planes`: the coarsest as if it were alone, then planes of
            `plane` bits one by one, each rounding what the levels before, which stay, leave of the weights.
        levels: of `joint`, bits of the levels that count beside the whole, like 4/3/2; "": all. The fewer there are,
            the nearer each comes to its bits alone, and the others are what is cut off.
        tilt: a level counts 2^tilt as much as one of a bit more. 0: all alike, in cells of their own.
        seed, plane: bits.
        damp: share of the mean diagonal of the Hessian that is added to it.
        refit: whether the bytes of levels are fitted; else levels have the middles of cells.
        passes: of `joint`, how often every code is looked at again while the others stay (`descent.py`), the bytes of
            levels fitted anew behind each.

    Cost: O·I² for each level in the sweep, and twice that in each pass.
    """

    grow: str = JOINT
    levels: str = ""
    tilt: float = 0.7
    seed: int = 4
    plane: int = 2
    damp: float = 0.01
    refit: bool = True
    passes: int = 8

    def __post_init__(self) -> None:
        if self.grow not in GROWN:
            raise ValueError(f"levels grow by one of {', '.join(GROWN)}, not {self.grow!r}")
        if not 0 <= self.tilt <= 4 or self.damp < 0 or not FEWEST <= self.seed <= 8:
            raise ValueError(
                f"tilt is 0 to 4, damp 0 or more, the seed 2 to 8 bits, not {self.tilt}, {self.damp}, {self.seed}"
            )
        if self.levels and not bits_of(self.levels):
            raise ValueError(f"levels are bits from {FEWEST} on, like 4/3/2, not {self.levels!r}")
        if self.passes < 0 or not 1 <= self.plane <= 6:
            raise ValueError(f"passes are 0 or more, a plane has 1 to 6 bits, not {self.passes} and {self.plane}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return len(self._weights(fmt.grid.bits)) * (1 + 2 * self.passes * (self.grow == JOINT))

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
        weights = self._weights(fmt.grid.bits)
        codes_OI = _grown(w_OI, fmt, step, weights, made.feedback_II, order_I)
        damp = self.damp * float(hessian_II.diagonal()[~dead_I].mean())
        damped_II = hessian_II + damp * torch.eye(len(dead_I), dtype=torch.float32, device=w_OI.device)
        if self.refit:
            step = refitted(w_OI, codes_OI, fmt, step, damped_II)
        for _ in range(self.passes if self.grow == JOINT else 0):
            codes_OI = descended(w_OI, codes_OI, replace(fmt, step=step), weights, damped_II)
            if self.refit:
                step = refitted(w_OI, codes_OI, fmt, step, damped_II)
        return Codes(codes_OI, step, notes=(*notes, *made.notes))

    def _weights(self, top: int) -> dict[int, float]:
        """Bits → what an error of a cell counts; 0 of all where levels come one after the other."""
        if self.grow == PLANES:
            return dict.fromkeys((*range(FEWEST, top, self.plane), top), 0.0)
        if self.grow == TOP:
            return {top: 1.0}
        if self.grow == SEED:
            return {top: 1.0} | ({self.seed: HELD_FAST} if self.seed < top else {})
        own = bits_of(self.levels) or tuple(range(FEWEST, top))
        levels = sorted({top, *(bits for bits in own if bits < top)})
        return {bits: 2.0 ** (self.tilt * (top - bits)) for bits in levels}


def bits_of(words: str) -> tuple[int, ...]:
    """4/3/2 → (4, 3, 2); () of what is not like that."""
    try:
        found = several(words, whole)
    except ValueError:
        return ()
    return found if all(FEWEST <= one <= 8 for one in found) and len({*found}) == len(found) else ()


def _grown(
    w_OI: Tensor, fmt: Format, step: Step, weights: dict[int, float], feedback_II: Tensor, order_I: Tensor
) -> Tensor:
    """codes_OI."""
    rows, columns = shape = (w_OI.shape[0], w_OI.shape[1])
    assert step.zero_G1 is not None, "a nested grid has a zero point"
    span = fmt.grain.span(shape)
    group_I = (torch.arange(columns, dtype=torch.int64, device=w_OI.device) // span)[order_I]
    scale_ON = along(step.scale_G1, rows)
    low_ON = along(-step.zero_G1 * step.scale_G1, rows)
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
        weight_K: what an error in codes, squared, counts; 0 of all: a level is inside the cells of those before it.
        most: the greatest code.
    """
    rows, columns = w_RI.shape
    scale_RI, low_RI = steps
    error_KRI = torch.zeros(len(wide_K), rows, columns, dtype=torch.float32, device=w_RI.device)
    codes_RI = torch.empty(rows, columns, dtype=torch.uint8, device=w_RI.device)
    wide_K1, half_K1 = wide_K[:, None], (wide_K[:, None] - 1) / 2
    last_K1 = (most + 1) / wide_K1 - 1
    whole, one_by_one = int(wide_K.argmin()), not bool(weight_K.any())
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
            if one_by_one:
                frozen_R = first_KR[0]
                for level in range(1, len(wide_K)):
                    own, last_R = wide_K[level], frozen_R + wide_K[level - 1]
                    near_R = ((z_KR[level] - half_K1[level]) / own).round() * own
                    frozen_R = torch.minimum(torch.maximum(near_R, frozen_R), last_R - own)
                tried_KR = frozen_R[None]
            cost_KR = torch.zeros_like(tried_KR)
            for level in range(len(wide_K)):
                wide = wide_K[level]
                value_KR = (tried_KR / wide).floor_() * wide + half_K1[level]
                cost_KR += weight_K[level] * (value_KR - z_KR[level]).square_()
            code_R = tried_KR.gather(0, cost_KR.argmin(0, keepdim=True))[0]
            codes_RI[:, column] = code_R.to(torch.uint8)
            value_KR = (code_R / wide_K1).floor_() * wide_K1 + half_K1
            error_KRI[:, :, column] = w_RI[:, column] - (value_KR * scale_R + low_R)
    return codes_RI
