"""Static steps of inputs that are learnt: scale and zero point of a tap, trained by `learn/loop.py`.

Legend: G groups, K values in a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.base import JOINED, Format, Grid, Scale, Step
from regauge.formats.learnt import Trained, passed
from regauge.formats.rangers import Static

SCALE, ZERO = "scale", "zero"


@dataclass(frozen=True)
class LearntStatic(Trained):
    """A step that is known before the call, trained from the range that calibration saw (MobileQuant, arXiv 2408.13933,
    its scale and offset of activations).

    The scale is s₀ · eᵃ and the zero point, on grids that have one, z₀ + b · (high − low), rounded; a and b begin at 0,
    so before any training this is `static`, to the bit. What comes out is a static step like any other.

    Differs: both are counted in shares of the range, so one learning rate serves every tap; the released code has
    1e-6 for the numbers themselves, and diverges at the rates of its other parameters.
    Cost: none when the model runs; in training a few passes over each input.

    Attributes:
        rate: learning rate.
    """

    rate: float = 0.003
    needs: ClassVar[frozenset[str]] = frozenset({"minimum", "maximum", JOINED})

    @property
    def name(self) -> str:
        return "learnt-static"

    @property
    def rates(self) -> Mapping[str, float]:
        return {SCALE: self.rate, ZERO: self.rate}

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        """The step before training."""
        return Static()(x_GK, grid, scale, weight_GK)

    def init(self, step: Step) -> dict[str, Tensor]:
        """a and b of every group, (G, 1) float32."""
        return {name: torch.zeros_like(step.scale_G1, dtype=torch.float32) for name in (SCALE, ZERO)}

    def apply(self, parameters: Mapping[str, Tensor], step: Step, fmt: Format) -> Step:
        """The step under these parameters, as it will be stored, differentiable."""
        raw_G1, grid = step.scale_G1 * parameters[SCALE].exp(), fmt.grid
        kept_G1, fields = fmt.scale.bind(raw_G1.detach(), grid, 1).store(raw_G1.detach())
        scale_G1 = kept_G1 + (raw_G1 - raw_G1.detach())
        if step.zero_G1 is None:
            return Step(scale_G1, None, fields)
        moved_G1 = step.zero_G1 + parameters[ZERO] * (grid.high - grid.low)
        zero_G1 = passed(moved_G1.clamp(grid.low, grid.high), torch.round)
        return Step(scale_G1, zero_G1, {**fields, "zero": grid.encode(zero_G1.detach())})
