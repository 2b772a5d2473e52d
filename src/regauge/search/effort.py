"""How much a search spends on itself, from the time it is given."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SHORT = 120.0  # seconds: under this, half of everything


@dataclass(frozen=True)
class Effort:
    """Amounts of work. `--time` takes fewer candidates before it takes less text.

    Attributes:
        calibration, search, evaluation: tokens.
        gradient: tokens of the backward pass.
        checks: single-group variants whose true KL is measured.
        neighbours, rounds: whole allocations compared around the best, and how often.
        points: sizes tried for the frontier.
        builds: artifacts made before a budget is given up.
        turns: rounds of the interleaved timing.
    """

    calibration: int = 32768
    search: int = 2048
    evaluation: int = 12288
    gradient: int = 4096
    checks: int = 32
    neighbours: int = 6
    rounds: int = 2
    points: int = 7
    builds: int = 4
    turns: int = 7
    memory: bool = True  # fresh processes that load the model

    @staticmethod
    def of(limit: float | None) -> Effort:
        if limit is None or limit >= 4 * SHORT:
            return Effort()
        if limit >= SHORT:
            return Effort(calibration=16384, checks=20, neighbours=4, rounds=1, evaluation=8192, points=6, turns=5)
        return Effort(
            calibration=8192, evaluation=6144, gradient=2048, checks=8, neighbours=2, rounds=1, points=6, builds=3,
            turns=5, memory=False,
        )  # fmt: skip


@dataclass(eq=False)
class Stopwatch:
    """Seconds by step, in the order in which they began."""

    limit: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def lap(self, step: str, since: float) -> None:
        self.seconds[step] = round(self.seconds.get(step, 0.0) + time.monotonic() - since, 2)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def over(self, share: float) -> bool:
        """Whether this share of the time limit is used up."""
        return self.limit is not None and self.spent > share * self.limit
