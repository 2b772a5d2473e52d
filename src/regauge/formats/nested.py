"""Steps of two levels along a row, and steps that have the value of code 0 beside them.

Legend: G groups, numbered row by row; R rows, L levels along a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats import levels
from regauge.formats.base import Grid, Low, Scale
from regauge.formats.lows import FloatLow, SuperLow
from regauge.formats.scales import Cast, Float16, Float32
from regauge.kernels.cpu.sweep import Stored

SUPER = "super_scale"


@dataclass(frozen=True, eq=False)
class Super:
    """The step as an integer code times a float16 that `groups` groups of a row share: GGUF's super-blocks.

    The level is fixed first, from the steps that the ranger takes freely; each step is then stored under it, and codes
    of weights are found for the stored step. llama.cpp does the same (`make_qp_quants`), weighted by its importances,
    where here all steps count alike. Steps are never 0. A level of few significant bits keeps code · level exact in
    float16.

    Attributes:
        bits: of a code of a step.
        groups: of a row that share a level; 0: all.
        signed: codes have a sign, kept as code + 2^(bits − 1).
        odd: a code c stands for 2c + 1 levels, so that none is 0: GGUF's IQ2 and IQ3 types.
        level_RL: set by `bind`.
    """

    bits: int = 8
    groups: int = 0
    signed: bool = False
    odd: bool = False
    level_RL: Tensor | None = None
    shared: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    low: ClassVar[None] = None
    kernel: ClassVar[Stored | None] = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.groups < 0:
            given = f"{self.bits} and {self.groups}"
            raise ValueError(f"a step has 2 to 8 bits under a level of 0 or more groups, not {given}")
        if self.odd and (self.signed or self.bits > 7):
            raise ValueError("odd steps have 2 to 7 bits and no sign")

    @property
    def name(self) -> str:
        return f"super:{self.bits}"

    @property
    def loose(self) -> Scale | None:
        return Cast("f32-signed", torch.float32, signed=True) if self.signed else Float32()

    @property
    def packed(self) -> Mapping[str, int]:
        return {"scale": self.bits} if self.bits < 8 else {}

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1 - self._middle

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        if self.level_RL is not None:
            return self
        bits, top = (self.bits + 1, 2 * self._top + 1) if self.odd else (self.bits, self._top)
        return replace(self, level_RL=levels.levels(scale_G1, rows, self.groups, bits, top, self.odd))

    def bytes(self, groups: int, rows: int = 1) -> int:
        return (groups * self.bits + 7) // 8 + 2 * levels.count(groups, rows, self.groups)

    def store(self, scale_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.level_RL is None:
            raise ValueError("steps of super-blocks share a level: bind it first")
        if self.odd:
            codes_G1 = levels.codes_of(scale_G1, self.level_RL, self.groups, 0, self._top, odd=True)
        else:
            codes_G1 = levels.codes_of(scale_G1.abs(), self.level_RL, self.groups, 1, self._top)
        if self.signed:
            codes_G1 = torch.where(scale_G1 < 0, -codes_G1, codes_G1) + self._middle
        fields = {"scale": codes_G1.to(torch.uint8), SUPER: self.level_RL}
        return self.load(fields), fields

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        codes_G1 = fields["scale"].int()
        codes_G1 = 2 * codes_G1 + 1 if self.odd else codes_G1 - self._middle
        return levels.numbers_of(codes_G1, fields[SUPER], self.groups)


@dataclass(frozen=True, eq=False)
class WithLow:
    """A step, and the value of the grid's least number beside it, on grids that otherwise have a zero point.

    w = step · (code − least code) + low. What a zero point among the codes rounds to a whole step, `low` keeps.
    """

    step: Scale
    beside: Low
    shared: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    kernel: ClassVar[Stored | None] = None

    @property
    def name(self) -> str:
        part, colon, bits = self.step.name.partition(":")
        return f"{part}-low{colon}{bits}"

    @property
    def low(self) -> Low | None:
        return self.beside

    @property
    def loose(self) -> Scale | None:
        inner = self.step.loose
        return None if inner is None else WithLow(inner, FloatLow(torch.float32))

    @property
    def signed(self) -> bool:
        return self.step.signed

    @property
    def packed(self) -> Mapping[str, int]:
        return self.step.packed

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        """Where the values beside are not known they are taken to reach as far as the steps do."""
        if low_G1 is None:
            low_G1 = -scale_G1 * (grid.high - grid.low)
        return WithLow(self.step.bind(scale_G1, grid, rows), self.beside.bind(low_G1, rows))

    def bytes(self, groups: int, rows: int = 1) -> int:
        return self.step.bytes(groups, rows)

    def store(self, scale_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step.store(scale_G1)

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        return self.step.load(fields)


def Float16Low() -> WithLow:
    """The step and the value of code 0, each in float16."""
    return WithLow(Float16(), FloatLow(torch.float16))


def SuperWithLow(bits: int = 8, groups: int = 0) -> WithLow:
    """The step and the value of code 0, each `bits` bits under a float16 for `groups` groups of a row (0: for all)."""
    return WithLow(Super(bits, groups), SuperLow(bits, groups))
