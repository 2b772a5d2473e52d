"""Allocations: how many units stay where. Widths are multiples of what kernels and groups of weights like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.prune.base import Group

MULTIPLE = 128
"""Columns that every group size in use divides."""
SHARE = 8
"""The automatic multiple is at most this part of the width, so that rounding moves the share by a sixteenth at most."""


@dataclass(frozen=True)
class _Kept:
    """The options that allocations share.

    Args:
        keep: the share of units that stays, above 0 and at most 1.
        multiple: what widths are rounded to (the nearest); 0: 128, halved until it is an eighth of the width or less.
    """

    keep: float = 0.75
    multiple: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share that stays, above 0 and at most 1; you wrote {self.keep:g}")
        if self.multiple < 0:
            raise ValueError(f"multiple is 1 or more, or 0 for an automatic one; you wrote {self.multiple}")

    def _step(self, group: Group) -> int:
        if self.multiple > group.units:
            raise ValueError(f"multiple is {self.multiple}, and {group.names[0]} has {group.units} units in all")
        if self.multiple:
            return self.multiple
        step = MULTIPLE
        while step > 1 and step * SHARE > group.units:
            step //= 2
        return step

    def _round(self, group: Group, wanted: float) -> int:
        """The multiple nearest to `wanted`, the smaller of two as near; all units where nothing goes."""
        step = self._step(group)
        if wanted >= group.units:
            return group.units
        return max(min(int(-(-(wanted / step - 0.5) // 1)), group.units // step), 1) * step


@dataclass(frozen=True)
class Uniform(_Kept):
    """The same share in every block. Sizes are known before any work, and stock formats can say them."""

    scored: ClassVar[bool] = False

    def __call__(self, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, int]:
        return {name: self._round(group, self.keep * group.units) for group in groups for name in group.names}


@dataclass(frozen=True)
class Global(_Kept):
    """One threshold for all blocks: a block in which many units matter little gives up more of them.

    Scores of a stream are first divided by their root mean square, since the residual, and with it what a block writes,
    grows with depth (FLAP, 2312.11983, standardises for the same reason). Experts of one stack keep the mean of what
    each would. Every stream keeps one multiple at least.

    Cost: a pass over the whole model before streaming begins. Stock formats cannot say uneven widths.
    """

    scored: ClassVar[bool] = True

    def __call__(self, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, int]:
        even = {name: scores[name] / scores[name].square().mean().sqrt().clamp_min(1e-300) for name in scores}
        names = [name for group in groups for name in group.names]
        every = torch.cat([even[name] for name in names])
        whose = torch.cat(
            [
                torch.full((len(even[name]),), number, dtype=torch.int64, device="cpu")
                for number, name in enumerate(names)
            ]
        )
        stay = every.argsort(descending=True, stable=True)[: round(self.keep * len(every))]
        counts = dict(zip(names, whose[stay].bincount(minlength=len(names)).tolist(), strict=True))
        return {
            name: self._round(group, sum(counts[one] for one in group.names) / len(group.names))
            for group in groups
            for name in group.names
        }
