"""Steps by column of a matrix, as error feedback in torch reads and makes them.

Legend: O output channels, G groups, N groups along a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Format, Step
from regauge.formats.laying import stored


@dataclass(frozen=True, eq=False)
class Columns:
    """Steps laid out so that those of one column are contiguous: (N, O), or (N, 1) for a step of the whole matrix."""

    scale_NO: Tensor
    zero_NO: Tensor | None

    @classmethod
    def of(cls, step: Step, fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> Columns:
        along = shape[1] // fmt.grain.span(shape)

        def turned(x_G1: Tensor) -> Tensor:
            x_GN = x_G1.view(-1, along)
            high = x_GN.shape[0]
            if high not in (1, shape[0]):
                x_GN = x_GN.repeat_interleave(shape[0] // high, 0)
            return x_GN.T.to(dtype).contiguous()

        return cls(turned(step.scale_G1), None if step.zero_G1 is None else turned(step.zero_G1))

    def at(self, group: int, rows: slice) -> tuple[Tensor, Tensor | None]:
        pick = (group, rows if self.scale_NO.shape[1] > 1 else slice(None))
        return self.scale_NO[pick], None if self.zero_NO is None else self.zero_NO[pick]


def together(fitted: Sequence[Step], fmt: Format) -> Step:
    """The steps of groups fitted one column of groups after another, numbered row by row."""
    scale_G1 = torch.cat([step.scale_G1 for step in fitted], 1).view(-1, 1)
    zeros = [step.zero_G1 for step in fitted if step.zero_G1 is not None]
    zero_G1 = torch.cat(zeros, 1).view(-1, 1) if zeros else None
    return stored(scale_G1, zero_G1, fmt.grid, fmt.scale.bind(scale_G1, fmt.grid, 1))
