"""One matrix as a block that is trained, for tests of what is learnt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regauge.learn.base import Parameters, Rates, Trial
from regauge.learn.sites import Together


@dataclass(frozen=True, eq=False)
class OneMatrix:
    """What all such blocks share: parts on a trial of the weight `w`, and the inputs X, in two batches."""

    parts: Together
    trial: Trial
    x_TI: Tensor

    @property
    def rates(self) -> Rates:
        return self.parts.rates

    @property
    def batches(self) -> int:
        return 2

    def init(self) -> Parameters:
        return self.parts.init(self.trial)
