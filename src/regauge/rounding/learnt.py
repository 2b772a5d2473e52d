"""Rounding that is learnt: what moves each weight to another code, trained by `learn/loop.py` on a block's error.

Legend: O output channels, I input channels, G groups, K weights in a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import OBJECTIVE, Codes, Format
from regauge.formats.learnt import checked_rate, in_steps, straight_through
from regauge.rounding.base import Rounder, Stats
from regauge.rounding.rounders import GPTQ, Nearest

OFFSET = "offset"
STARTS: Mapping[str, Rounder] = {"nearest": Nearest(), "gptq": GPTQ(static_groups=True, order="activation")}
"""Where learning may begin: the codes of another rounder."""
INSIDE = 0.499
"""Of half a step: how far inside the interval of its code a weight is put that begins with another than its nearest."""


@dataclass(frozen=True)
class LearntOffset:
    """An offset V for each weight, in steps, added before rounding (AutoRound, arXiv 2309.05516): round(w/s + z + V).

    V begins at 0 and is trained by the error of the block's output, rounding passed straight through; beside `ranger:
    learnt-share` the range is trained with it, as published. With `optimiser: sign`, a linear schedule and the default
    rate |V| stays below (N + 1) / 2N after N steps, so that a weight reaches the codes on both sides of it.

    Differs: V may begin where another rounder's codes are (`gptq`), each offset the least that gives its code; the
    parameters with the least error over all calibration text are kept, where the released code takes the loss of one
    batch. On integers only.
    Cost: in each training step about a dozen passes over the weights, beside running the block forward and backward.

    Attributes:
        start: `nearest` (V = 0) or `gptq`.
        rate: learning rate; None: one over the number of steps.
    """

    start: str = "nearest"
    rate: float | None = None

    def __post_init__(self) -> None:
        checked_rate(self.rate)
        if self.start not in STARTS:
            raise ValueError(f"learning starts from one of {', '.join(STARTS)}, not {self.start!r}")

    @property
    def needs(self) -> frozenset[str]:
        return STARTS[self.start].needs | {OBJECTIVE}

    @property
    def rates(self) -> Mapping[str, float | None]:
        return {OFFSET: self.rate}

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        """The codes before training."""
        return STARTS[self.start](w_OI, fmt, stats)

    def init(self, w_OI: Tensor, fmt: Format, stats: Stats) -> dict[str, Tensor]:
        """V (O, I), float32."""
        offset_GK = torch.zeros_like(fmt.grain.split(w_OI), dtype=torch.float32)
        if self.start != "nearest":
            z_GK = in_steps(fmt.grain.split(w_OI).float(), fmt.fit(w_OI))
            codes = STARTS[self.start](w_OI, fmt, stats)
            wanted_GK = fmt.grid.decode(fmt.grain.split(codes.codes_OI))
            offset_GK = z_GK.clamp(wanted_GK - INSIDE, wanted_GK + INSIDE) - z_GK
            same_GK = fmt.grid.snap(z_GK.clone()) == wanted_GK  # also beyond the ends of the grid
            offset_GK = offset_GK.masked_fill(same_GK, 0)
        return {OFFSET: fmt.grain.join(offset_GK, w_OI)}

    def apply(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format, progress: float) -> Tensor:
        """Ŵ under these offsets, float32, differentiable in them and in the step."""
        offset_GK = fmt.grain.split(parameters[OFFSET])
        return fmt.grain.join(straight_through(fmt.grain.split(w_OI).float(), fmt.fit(w_OI), fmt.grid, offset_GK), w_OI)

    def beside(
        self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format, progress: float
    ) -> Mapping[int, Tensor]:
        return {}

    def penalty(self, parameters: Mapping[str, Tensor], progress: float) -> Tensor | None:
        return None

    def finish(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format) -> Codes:
        """The codes under these offsets, exactly those that were trained."""
        step, grid = fmt.fit(w_OI), fmt.grid
        z_GK = in_steps(fmt.grain.split(w_OI).float(), step, fmt.grain.split(parameters[OFFSET]))
        return Codes(fmt.grain.join(grid.encode(grid.snap(z_GK.clamp(grid.low, grid.high))), w_OI), step)
