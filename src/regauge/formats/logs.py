"""Grids of powers for what lies between 0 and 1: attention probabilities, of which most are small.

A code k stands for base^(−k), the last code for 0. What counts is the exponent, so `snap` rounds that: a value goes to
the power nearest on a logarithmic axis, and to 0 where it lies below half a place under the least power.

With base 2 a product with 2^(−k) is a shift. With base √2 steps are half as large, and a product is still a shift:
√2^(−k) = 2^(−⌈k/2⌉) · (√2 where k is odd, else 1), so a kernel keeps one sum of the even codes and one of the odd, and
multiplies the second by √2 once (`parity`).

References: log2, FQ-ViT (arXiv 2111.13824); log-√2 and the parity factor, RepQuant (arXiv 2402.05628). Differs: there a
value beyond the last power becomes a 0 that no code stands for; here the last code is 0, so that all fit the bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regauge.formats.grid import Single
from regauge.kernels.cpu.sweep import Values


@dataclass(frozen=True)
class Powers(Single):
    """1, 1/b, 1/b², …, and 0.

    Attributes:
        root: how many steps halve a value: b = 2^(1/root).
    """

    bits: int = 4
    root: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"a grid of powers has 2 to 8 bits, not {self.bits}")

    @property
    def name(self) -> str:
        return "log2" if self.root == 1 else "log-sqrt2"

    @property
    def kind(self) -> str:
        return "powers"

    @property
    def offset(self) -> int:
        return 0

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def cast(self) -> torch.dtype | None:
        return None

    @property
    def low(self) -> float:
        return 0.0

    @property
    def high(self) -> float:
        return 1.0

    @property
    def last(self) -> int:
        """The code of 0; the powers' codes lie below it."""
        return (1 << self.bits) - 1

    @cached_property
    def table(self) -> Tensor:
        code = torch.arange(self.last + 1, dtype=torch.float64, device="cpu")
        value = torch.exp2(-code / self.root)
        value[self.last] = 0.0
        return value.float()

    @property
    def kernel(self) -> Values | None:
        return None

    def snap(self, z: Tensor) -> Tensor:
        return self.decode(self._place(z)).to(z.dtype) + z * 0  # what is not finite is seen in the result

    def encode(self, z: Tensor) -> Tensor:
        return self._place(z).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return self.table.to(codes.device)[codes.int()]

    def _place(self, z: Tensor) -> Tensor:
        """The code of each value, int32: −root · log2 z, rounded."""
        least = 2.0 ** (-(self.last + 1) / self.root)
        place = (-self.root * z.float().clamp(min=least, max=1.0).nan_to_num(0.0).log2()).round()
        return place.clamp(0, self.last).int()


def Log2(bits: int = 4) -> Powers:
    """1, 1/2, 1/4, … and 0. arXiv 2111.13824."""
    return Powers(bits, 1)


def LogSqrt2(bits: int = 4) -> Powers:
    """1, 1/√2, 1/2, … and 0. arXiv 2402.05628."""
    return Powers(bits, 2)


def parity(codes: Tensor) -> tuple[Tensor, Tensor]:
    """What a code of base √2 is to a kernel that shifts: (k, factor) with value = 2^(−k) · factor, factor √2 where the
    code is odd, else 1; the last code, which stands for 0, is not such a code."""
    odd = codes.int() & 1
    return (codes.int() + odd) // 2, torch.where(odd == 1, math.sqrt(2.0), 1.0)
