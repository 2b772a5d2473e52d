"""Rounding that is learnt as a choice between two codes: the one below a weight, or the one above.

Legend: O output channels, I input channels, G groups, K weights in a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import OBJECTIVE, Codes, Format
from regauge.formats.learnt import checked_rate, in_steps
from regauge.rounding.base import Stats
from regauge.rounding.rounders import Nearest

SIDE = "side"
GAMMA, ZETA = -0.1, 1.1  # the sigmoid is stretched to these and cut at 0 and 1
WARM = 0.2  # share of the steps without a penalty
FROM, TO = 20.0, 2.0  # the exponent of the penalty, as it falls


@dataclass(frozen=True)
class LearntSide:
    """A number V for each weight that says how far up it is rounded, from the code below, h = 0, to the one above,
    h = 1 (AdaRound, arXiv 2004.10568, equations 23 and 24): h(V) = clip(sigmoid(V) (ζ − γ) + γ, 0, 1), γ = −0.1 and
    ζ = 1.1.

    V begins where h is what rounding down cuts off, and is trained by the error of the block's output, soft; after a
    fifth of the steps the penalty λ · mean(1 − |2h − 1|^β), β falling from 20 to 2, draws each h to 0 or 1. The codes
    are those of h ≥ ½, and by them the error that decides is taken: before training it is nearest rounding.

    Differs: trained by the block, where AdaRound takes a layer at a time; λ weighs a mean against the share of the
    output's energy that is lost, not a sum against a mean square; the best by the hard codes is kept.
    Cost: in each training step about a dozen passes over the weights, beside running the block forward and backward.

    Attributes:
        rate: learning rate: in some 200 steps V has to go as far as in the published 20,000 at 0.001.
        weight: λ.
    """

    rate: float = 0.02
    weight: float = 0.01

    def __post_init__(self) -> None:
        checked_rate(self.rate)
        if not self.weight >= 0:
            raise ValueError(f"a penalty is weighed by 0 or more, not {self.weight}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({OBJECTIVE})

    @property
    def rates(self) -> Mapping[str, float | None]:
        return {SIDE: self.rate}

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        """The codes before training."""
        return Nearest()(w_OI, fmt, stats)

    def init(self, w_OI: Tensor, fmt: Format, stats: Stats) -> dict[str, Tensor]:
        """V (O, I), float32."""
        z_GK = in_steps(fmt.grain.split(w_OI).float(), fmt.fit(w_OI))
        share_GK = (z_GK - z_GK.floor() - GAMMA) / (ZETA - GAMMA)
        return {SIDE: fmt.grain.join(torch.logit(share_GK), w_OI)}

    def apply(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format, progress: float) -> Tensor:
        """Ŵ under these V, float32, differentiable; hard at the end."""
        step = fmt.fit(w_OI.detach())
        up_GK = _up(fmt.grain.split(parameters[SIDE]))
        z_GK = self._below(w_OI, fmt) + (up_GK if progress < 1 else (up_GK >= 0.5).float())
        z_GK = z_GK.clamp(fmt.grid.low, fmt.grid.high)
        z_GK = z_GK if step.zero_G1 is None else z_GK - step.zero_G1
        return fmt.grain.join(z_GK * step.scale_G1, w_OI)

    def beside(
        self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format, progress: float
    ) -> Mapping[int, Tensor]:
        return {}

    def penalty(self, parameters: Mapping[str, Tensor], progress: float) -> Tensor | None:
        if progress < WARM or not self.weight:
            return None
        power = TO + (FROM - TO) * (1 - (progress - WARM) / (1 - WARM))
        return self.weight * (1 - (2 * _up(parameters[SIDE]) - 1).abs().pow(power)).mean()

    def finish(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format) -> Codes:
        """The codes of the sides that were learnt."""
        step, grid = fmt.fit(w_OI), fmt.grid
        z_GK = self._below(w_OI, fmt) + (_up(fmt.grain.split(parameters[SIDE])) >= 0.5).float()
        return Codes(fmt.grain.join(grid.encode(z_GK.clamp(grid.low, grid.high)), w_OI), step)

    @staticmethod
    def _below(w_OI: Tensor, fmt: Format) -> Tensor:
        return in_steps(fmt.grain.split(w_OI.detach()).float(), fmt.fit(w_OI.detach())).floor()


def _up(side: Tensor) -> Tensor:
    return (torch.sigmoid(side) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
