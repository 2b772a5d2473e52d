"""How much of an input's range is kept: a share of it that is learnt, one for all tokens of a tap.

Legend: G groups, K values in a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.base import Grid, Scale, Step, ends
from regauge.formats.learnt import Trained
from regauge.formats.rangers import Dynamic
from regauge.kernels.cpu.sweep import Range

SHARE = "share"


@dataclass(frozen=True, eq=False)
class Clipped:
    """A share of the range of the values at hand, as `Dynamic` lays it over the grid; what lies beyond is clipped.

    Attributes:
        share_1: (1,) float32, above 0 and at most 1.
    """

    share_1: Tensor
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def name(self) -> str:
        return "clipped"

    @property
    def kernel(self) -> Range | None:
        return None

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        ends_G2 = torch.cat(ends(x_GK), 1) * self.share_1.to(x_GK.device)
        return Dynamic()(ends_G2, grid, scale)


@dataclass(frozen=True)
class LearntReach(Trained):
    """A learnt clip of an input (FlatQuant, arXiv 2410.09426): each token's range times sigmoid(c), c one number for
    all tokens of a tap, trained by the error of the block's output with whatever else is learnt there. It begins at 4,
    a share of 0.982, as published.

    Differs: one number for both ends of a range; the published code has one for each, which are one on the symmetric
    grids that it uses.
    Cost: one product a token while the model runs.

    Attributes:
        rate: learning rate, the published 0.05.
        start: c before training.
    """

    rate: float = 0.05
    start: float = 4.0

    @property
    def name(self) -> str:
        return "learnt-reach"

    @property
    def rates(self) -> Mapping[str, float | None]:
        return {SHARE: self.rate}

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        """The step before training."""
        return Clipped(self.share(self.init()))(x_GK, grid, scale, weight_GK)

    def init(self) -> dict[str, Tensor]:
        """c, (1,) float32."""
        return {SHARE: torch.full((1,), self.start, dtype=torch.float32, device="cpu")}

    def share(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What is kept of a range under these parameters, differentiable."""
        return torch.sigmoid(parameters[SHARE])
