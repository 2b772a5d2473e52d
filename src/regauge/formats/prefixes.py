"""The grid of integers whose codes' first bits are codes of fewer bits. See `planes.py` for what those stand for.

Legend: O output channels, I input channels, P planes, B bytes of a row's bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.grids import Int
from regauge.kernels.reference import pack, unpack

FEWEST = 2
"""Bits of the coarsest level."""


@dataclass(frozen=True)
class Nested(Int):
    """Integers 0 … 2^bits − 1 with a zero point, whose codes' first bits are codes of fewer bits.

    They are stored plane by plane, the highest bit first, so that a level is the first bytes of a tensor.
    """

    bits: int = 8
    symmetric: bool = field(default=False, init=False)
    coarsest: ClassVar[int | None] = FEWEST

    def __post_init__(self) -> None:
        if not FEWEST < self.bits <= 8:
            raise ValueError(f"what has levels from {FEWEST} bits on has {FEWEST + 1} to 8, not {self.bits}")

    @property
    def name(self) -> str:
        return f"nested:{self.bits}"

    def stored(self, codes_OI: Tensor) -> Tensor:
        """(P, O, B), the highest bit first."""
        shifts = range(self.bits - 1, -1, -1)
        return torch.stack([pack((codes_OI >> shift & 1).contiguous(), 1) for shift in shifts])

    def read(self, planes_POB: Tensor, columns: int) -> Tensor:
        """codes_OI of the planes that are given, the first ones.

        Raises:
            ValueError: they are none.
        """
        if planes_POB.ndim != 3 or planes_POB.dtype is not torch.uint8 or not 0 < len(planes_POB) <= self.bits:
            raise ValueError(f"codes of {self.name} are {self.bits} planes of bytes")
        codes_OI = unpack(planes_POB[0], 1, columns)
        for plane_OB in planes_POB[1:]:
            codes_OI = codes_OI << 1 | unpack(plane_OB, 1, columns)
        return codes_OI
