"""How big the step is. Weights and activations alike.

Every ranger stores the step first and uses the stored one from there on, so that what is searched is what is decoded.
Groups of zeros, constants, subnormal and huge values get finite positive steps.

Legend: G groups, K weights in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Grid, Ranger, Scale, Step, ends, reach
from regauge.formats.chunks import chunks
from regauge.formats.laying import even, middle, over, stored, uneven
from regauge.formats.numbers import zeroless
from regauge.kernels.cpu import sweep
from regauge.kernels.cpu.checks import DTYPES

LEAST = torch.finfo(torch.float32).eps * torch.finfo(torch.float32).tiny ** 0.5
"""The least step that is taken from values at hand."""


@dataclass(frozen=True)
class AbsMax:
    """The range [−a, a], a the largest magnitude of the group, laid over the whole grid: step = 2a / (high − low).

    On floats and code books a lands on the grid's end. On integers, which reach one further down than up, +a lands half
    a step beyond the greatest code and is clipped by that half; this is the convention of GPTQ's code and of
    compressed-tensors. On an asymmetric grid the zero point is the middle.
    """

    @property
    def name(self) -> str:
        return "absmax"

    @property
    def kernel(self) -> sweep.Range | None:
        return sweep.Range(sweep.ABSMAX)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        raw_G1 = even(reach(x_GK), grid)
        return stored(raw_G1, middle(raw_G1, grid), grid, scale.bind(raw_G1, grid, 1))


@dataclass(frozen=True)
class MinMax:
    """The range [min, max] of the group, widened to hold 0, laid over the grid; nothing is clipped.

    On a symmetric grid the step is the least that reaches both ends: max(min / low, max / high).
    """

    @property
    def name(self) -> str:
        return "minmax"

    @property
    def kernel(self) -> sweep.Range | None:
        return sweep.Range(sweep.MINMAX)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        low_G1, high_G1 = (end.clamp(max=0) if i == 0 else end.clamp(min=0) for i, end in enumerate(ends(x_GK)))
        raw_G1 = even(torch.maximum(-low_G1, high_G1), grid)
        return uneven(low_G1, high_G1, grid, scale.bind(raw_G1, grid, 1))


@dataclass(frozen=True)
class Dynamic:
    """The range of the values at hand, taken anew in each call: [-a, a] on symmetric grids, else [min, max] with 0.

    Works in float32. A group of zeros, or one too small for a float32 step, gets the least positive step; what is not
    finite stays so, and is seen in the result. Differs: compressed-tensors works in the dtype of the activations, so in
    bf16 its steps and quotients are rounded to bf16; in float32 the two agree to the bit (asymmetric: but for quotients
    that lie on a tie).
    """

    @property
    def name(self) -> str:
        return "dynamic"

    @property
    def kernel(self) -> sweep.Range | None:
        return None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        low_G1, high_G1 = ends(x_GK)
        if grid.symmetric:
            raw_G1 = even(torch.maximum(-low_G1, high_G1), grid)
        else:
            low_G1, high_G1, width = low_G1.clamp(max=0), high_G1.clamp(min=0), grid.high - grid.low
            raw_G1 = over(high_G1 - low_G1, width)
            raw_G1 = torch.where(raw_G1.isfinite(), raw_G1, over(high_G1, width) - over(low_G1, width))
        kept_G1, fields = scale.bind(raw_G1, grid, 1).store(raw_G1.clamp(min=LEAST))
        scale_G1 = torch.where(raw_G1.isfinite(), kept_G1, raw_G1.float())
        if grid.symmetric:
            return Step(scale_G1, None, fields)
        zero_G1 = (grid.low - low_G1 / scale_G1).round().clamp(grid.low, grid.high).float()
        return Step(scale_G1, zero_G1, {**fields, "zero": grid.encode(zero_G1.nan_to_num())})


@dataclass(frozen=True)
class Static:
    """A range that is known before the call: of all that calibration saw, [-a, a] on symmetric grids, else [min, max].

    The step is stored in the artifact and is the same for every token, as compressed-tensors' `dynamic: false` has it.
    What lies beyond it later is clipped. For grains whose steps are not a token's own: `tensor`, `group:N`.
    """

    @property
    def name(self) -> str:
        return "static"

    @property
    def kernel(self) -> sweep.Range | None:
        return None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"minimum", "maximum"})

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        found: Ranger = AbsMax() if grid.symmetric else MinMax()
        return found(x_GK, grid, scale, weight_GK)


@dataclass(frozen=True)
class Search:
    """The range, shrunk, with the least squared error, each element's counted by `weight_GK` where that is given.

    Candidates are AbsMax, MinMax, `steps` shrinks from `most` down to `least`, and the least-squares step for the codes
    of the best of them. All are stored steps, so the result is never worse than AbsMax or MinMax under the same
    objective. A share above 1 leaves the last codes unused: on grids whose spacing grows, such as fp4, the largest
    weights may lie better below them, and steps of few bits are then all tried (4/6, arXiv 2512.02010).

    Cost: about seven passes over the weights a candidate.
    """

    steps: int = 20
    least: float = 0.4
    most: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.least <= 1 <= self.most:
            given = f"{self.steps}, {self.most} and {self.least}"
            raise ValueError(f"a search takes 1 or more steps from a share of 1 or more to one in (0, 1], not {given}")

    @property
    def name(self) -> str:
        return "search"

    @property
    def kernel(self) -> sweep.Range | None:
        return sweep.Range(sweep.SEARCH, self._shares)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        low_G1, high_G1 = ends(x_GK)
        low_G1, high_G1 = low_G1.clamp(max=0), high_G1.clamp(min=0)
        raw_G1 = even(torch.maximum(-low_G1, high_G1), grid)
        scale = scale.bind(raw_G1, grid, 1)
        found = by_kernel(self.kernel, x_GK, grid, scale, weight_GK)
        if found is not None:
            return found
        best = stored(raw_G1, middle(raw_G1, grid), grid, scale)
        error_G1 = squared_error(x_GK, best, grid, weight_GK)
        for index, share in enumerate(self._shares):
            if grid.symmetric and index:
                step = stored(raw_G1 * share, None, grid, scale)
            else:
                step = uneven(low_G1 * share, high_G1 * share, grid, scale)
            best, error_G1 = better(best, error_G1, step, squared_error(x_GK, step, grid, weight_GK))
        step = stored(_least_squares(x_GK, best, grid, weight_GK), best.zero_G1, grid, scale)
        return better(best, error_G1, step, squared_error(x_GK, step, grid, weight_GK))[0]

    @property
    def _shares(self) -> tuple[float, ...]:
        """1 first, as the kernels want it, then the others, downwards."""
        shares = [self.most - (self.most - self.least) * index / self.steps for index in range(self.steps + 1)]
        return (1.0, *(share for share in shares if share != 1))


LONGEST = 1 << 14
"""Weights of a group that the C++ kernels take: longer ones keep torch busy without them, and 64 lie in a tile."""


def by_kernel(
    found: sweep.Range | None, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None
) -> Step | None:
    """The step of every group by the C++ kernels; None where they do not have it, so that torch computes.

    That is: there is no library, another device or dtype, longer groups, numbers that are not finite, a grid without 0
    (of zeros the kernels make a step of 1), or a part without a `kernel`.

    Args:
        scale: bound.
    """
    if x_GK.dtype not in DTYPES or not 0 < x_GK.shape[1] <= LONGEST or not sweep.has_sweep(x_GK, weight_GK):
        return None
    values, kept = grid.kernel, scale.kernel
    if found is None or values is None or kept is None or zeroless(grid):
        return None
    made = sweep.fitted(x_GK, values, found, kept, None if weight_GK is None else weight_GK.float())
    if made is None:
        return None
    return stored(made[0], made[1], grid, scale)


def squared_error(x_GK: Tensor, step: Step, grid: Grid, weight_GK: Tensor | None = None) -> Tensor:
    """Σ weight · (x − x̂)² of each group (G, 1), float32."""
    error_G1 = torch.empty(x_GK.shape[0], 1, device=x_GK.device, dtype=torch.float32)
    for part in chunks(x_GK):
        x = x_GK[part].float()
        z = _codes(x, part, step, grid, weight_GK)
        miss = torch.addcmul(x, z, step.scale_G1[part], value=-1).square_()
        error_G1[part] = (miss if weight_GK is None else miss.mul_(weight_GK[part])).sum(1, keepdim=True)
    return error_G1


def _least_squares(x_GK: Tensor, step: Step, grid: Grid, weight_GK: Tensor | None) -> Tensor:
    """The raw step with the least error for the codes that `step` gives: Σ weight·x·z / Σ weight·z²."""
    raw_G1 = step.scale_G1.clone()
    for part in chunks(x_GK):
        x = x_GK[part].float()
        z = _codes(x, part, step, grid, weight_GK)
        counted = z if weight_GK is None else z * weight_GK[part]
        above, below = (counted * x).sum(1, keepdim=True), (counted * z).sum(1, keepdim=True)
        raw_G1[part] = torch.where((below > 0) & (above > 0), above / below, raw_G1[part])
    return raw_G1.nan_to_num_(nan=1.0).clamp_(max=torch.finfo(torch.float32).max)


def _codes(x: Tensor, part: slice, step: Step, grid: Grid, weight_GK: Tensor | None) -> Tensor:
    """Grid values of some groups, less the zero point."""
    z = x / step.scale_G1[part]
    if step.zero_G1 is None:
        return grid.near(z, None if weight_GK is None else weight_GK[part])
    return grid.snap(z.add_(step.zero_G1[part])).sub_(step.zero_G1[part])


def better(old: Step, old_G1: Tensor, new: Step, new_G1: Tensor) -> tuple[Step, Tensor]:
    """For each group the step with the lesser error; the old one where they are equal."""
    wins_G1 = new_G1 < old_G1
    return either(wins_G1, new, old), torch.where(wins_G1, new_G1, old_G1)


def either(wins_G1: Tensor, new: Step, old: Step) -> Step:
    """For each group (G, 1) one step where it wins, the other elsewhere; what groups share is the same in both."""

    def picked(a: Tensor, b: Tensor) -> Tensor:
        whole = (a.view(torch.uint8), b.view(torch.uint8)) if a.element_size() == 1 else (a, b)
        return torch.where(wins_G1, *whole).view(a.dtype)

    zero_G1 = None if new.zero_G1 is None or old.zero_G1 is None else picked(new.zero_G1, old.zero_G1)
    kept = {name: picked(f, old.fields[name]) if f.shape == wins_G1.shape else f for name, f in new.fields.items()}
    return Step(picked(new.scale_G1, old.scale_G1), zero_G1, kept)
