"""Steps refitted to the codes that trial steps give: by least squares, and by half-quadratic splitting.

Legend: G groups, K weights in a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.base import Grid, Scale, Step, ends
from regauge.formats.chunks import chunks
from regauge.formats.laying import even, placed, stored, uneven
from regauge.formats.rangers import MinMax, Search, better, squared_error
from regauge.kernels.cpu.sweep import Range

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LeastSquares:
    """Codes of some trial steps, each refitted by least squares; the best of them as it is stored (llama.cpp).

    Where the scale keeps the value of code 0 a trial ends in the step and low that leave Σ weight · (x − step · code −
    low)² least (`make_qkx3_quants`), where it does not in the step (`make_qx_quants`), of either sign where the scale
    takes signs. The error counted is that of the stored step, with codes found anew for it. On grids with a zero point
    among the codes it is `search`.

    Differs: llama.cpp refits two-level steps by five rounds of coordinate descent; here a second search runs under the
    level. The range is cut into from 0.9 steps less than the grid has to 0.4 times more (there 0.9 more), which clips.
    Cost: some ten passes over the weights for each of `steps` trials, twice under two-level steps.

    Attributes:
        steps: trials.
    """

    steps: int = 20
    needs: ClassVar[frozenset[str]] = frozenset()
    kernel: ClassVar[Range | None] = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a search takes 1 or more steps, not {self.steps}")

    @property
    def name(self) -> str:
        return "least-squares"

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        if not grid.symmetric and scale.low is None:
            return Search()(x_GK, grid, scale, weight_GK)
        low_G1, high_G1 = (end.float() for end in ends(x_GK))
        low_G1, high_G1 = low_G1.clamp(max=0), high_G1.clamp(min=0)
        raw_G1 = even(torch.maximum(-low_G1, high_G1), grid)
        scale = scale.bind(raw_G1, grid, 1)
        best = stored(raw_G1, None, grid, scale) if grid.symmetric else uneven(low_G1, high_G1, grid, scale)
        error_G1 = squared_error(x_GK, best, grid, weight_GK)
        for step in self._trials(x_GK, grid, scale, weight_GK):
            best, error_G1 = better(best, error_G1, step, squared_error(x_GK, step, grid, weight_GK))
        return best

    def _trials(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None) -> Iterator[Step]:
        low_G1, high_G1 = (end.float() for end in ends(x_GK))
        if not grid.symmetric:
            assert scale.low is not None, "else it is a search"
            low_G1 = low_G1 if scale.low.signed else low_G1.clamp(max=0)
            width_G1 = (high_G1 - low_G1).clamp(min=TINY)
            for codes in self._counts(grid.high - grid.low):
                yield _line(x_GK, width_G1 / codes, low_G1, weight_GK, grid, scale)
            return
        reach_G1 = torch.maximum(-low_G1, high_G1).clamp(min=TINY)
        further = -grid.low  # the end that integers reach further to
        turned_G1 = torch.where(-low_G1 >= high_G1, 1.0, -1.0)
        for codes in self._counts(further, 0.7 if grid.run > 1 else 1.0):
            raw_G1 = reach_G1 / codes
            yield _slope(x_GK, raw_G1 * turned_G1 if scale.signed else raw_G1, weight_GK, grid, scale)

    def _counts(self, codes: float, least: float = 1.0) -> list[float]:
        """Into how many steps the range is cut, over all trials; words may leave the last codes unused."""
        least, most = max(least * codes - 0.9, 0.4), codes + max(2.4, 0.4 * codes)
        return [least + (most - least) * index / max(self.steps - 1, 1) for index in range(self.steps)]


def _line(x_GK: Tensor, raw_G1: Tensor, low_G1: Tensor, weight_GK: Tensor | None, grid: Grid, scale: Scale) -> Step:
    """Step and low of the codes that a trial step gives from `low_G1` on; `scale` keeps both."""
    assert scale.low is not None, "a step alone is fitted by its slope"
    keeps = scale.low
    fitted_G1, offset_G1 = raw_G1.clone(), low_G1.clone()
    for part in chunks(x_GK):
        x = x_GK[part].float()
        c = ((x - low_G1[part]) / raw_G1[part]).round_().clamp_(0, grid.high - grid.low)
        w = torch.ones_like(x) if weight_GK is None else weight_GK[part].float()
        sums = [(w * f).sum(1, keepdim=True) for f in (torch.ones_like(x), c, c * c, x, x * c)]
        total, of_c, of_cc, of_x, of_xc = sums
        det = total * of_cc - of_c * of_c
        step = (total * of_xc - of_x * of_c) / det
        low = (of_cc * of_x - of_c * of_xc) / det
        if not keeps.signed:
            above = low > 0
            step, low = torch.where(above, of_xc / of_cc, step), low.clamp(max=0)
        fine = (det > 0) & (step > 0) & step.isfinite() & low.isfinite()
        fitted_G1[part] = torch.where(fine, step, fitted_G1[part])
        offset_G1[part] = torch.where(fine, low, offset_G1[part])
    return placed(fitted_G1, offset_G1, grid, scale, keeps)


def _slope(x_GK: Tensor, raw_G1: Tensor, weight_GK: Tensor | None, grid: Grid, scale: Scale) -> Step:
    """The step of the grid values that a trial step gives."""
    fitted_G1 = raw_G1.clone()
    for part in chunks(x_GK):
        x = x_GK[part].float()
        z = grid.near(x / raw_G1[part], None if weight_GK is None else weight_GK[part])
        counted = z if weight_GK is None else z * weight_GK[part]
        step = (counted * x).sum(1, keepdim=True) / (counted * z).sum(1, keepdim=True)
        fine = step.isfinite() & (step * raw_G1[part] > 0)
        fitted_G1[part] = torch.where(fine, step, fitted_G1[part])
    return stored(fitted_G1, None, grid, scale)


@dataclass(frozen=True)
class HalfQuadratic:
    """The value of code 0 that leaves few large errors, by half-quadratic splitting (HQQ, mobiusml.github.io/hqq_blog).

    The step is that of `minmax` and stays. With e = shrink(x − x̂), the proximal step of the ℓp norm at weight β, the
    zero z becomes the mean over the group of code − (x − e) / step, and so on: β grows by `growth` each round; rounds
    end where the mean |x − x̂| of the whole matrix rises. No text.

    Where the scale keeps the value of code 0 it is −step · z, elsewhere z is rounded to a code, which the released code
    does at 4 bits only. On symmetric grids there is no zero to move: it is `minmax`.

    Cost: about ten passes over the weights a round.
    Differs: none known; the last round's zero is kept, as there, though its error was the larger.

    Attributes:
        rounds: at most. power: p. beta: of the first round.
    """

    rounds: int = 20
    power: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    needs: ClassVar[frozenset[str]] = frozenset()
    kernel: ClassVar[Range | None] = None

    def __post_init__(self) -> None:
        if self.rounds < 0 or not 0 < self.power <= 1 or not self.beta > 0:
            given = f"{self.rounds}, {self.power} and {self.beta}"
            raise ValueError(f"rounds are 0 or more, power lies in (0, 1] and beta above 0, not {given}")

    @property
    def name(self) -> str:
        return "half-quadratic"

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        if grid.symmetric:
            return MinMax()(x_GK, grid, scale, weight_GK)
        low_G1, high_G1 = (end.float() for end in ends(x_GK))
        if scale.low is None or not scale.low.signed:
            low_G1, high_G1 = low_G1.clamp(max=0), high_G1.clamp(min=0)
        raw_G1 = (high_G1 / (grid.high - grid.low) - low_G1 / (grid.high - grid.low)).clamp(min=TINY)
        scale = scale.bind(raw_G1, grid, 1)
        scale_G1, _ = scale.store(raw_G1)
        zero_G1 = self._moved(x_GK, scale_G1, grid.low - low_G1 / scale_G1, grid)
        if scale.low is None:
            zero_G1 = zero_G1.round().clamp(grid.low, grid.high)
        return stored(scale_G1, zero_G1, grid, scale)

    def _moved(self, x_GK: Tensor, scale_G1: Tensor, zero_G1: Tensor, grid: Grid) -> Tensor:
        beta, best = self.beta, float("inf")
        for _ in range(self.rounds):
            missed = 0.0
            moved_G1 = torch.empty_like(zero_G1)
            for part in chunks(x_GK):
                x, scale, zero = x_GK[part].float(), scale_G1[part], zero_G1[part]
                z = grid.snap(x / scale + zero)
                error = x - (z - zero) * scale
                size = error.abs()
                kept = error.sign() * (size - size.pow(self.power - 1) / beta).clamp_(min=0).nan_to_num_(0.0)
                moved_G1[part] = (z - (x - kept) / scale).mean(1, keepdim=True)
                missed += float(size.double().sum())
            zero_G1, beta = moved_G1, beta * self.growth
            if not missed < best:
                break
            best = missed
        return zero_G1
