"""How the value of a grid's least number is stored, where it is a number of its own and no zero point among the codes.

Legend: G groups, numbered row by row; R rows, L levels along a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.formats import levels

LOW, SUPER_LOW = "low", "super_low"
"""The fields of a step that hold it: the number, or its code and the level of the codes."""


@runtime_checkable
class Low(Protocol):
    """As `Scale`, of the value of the least number; fields bear its own names."""

    @property
    def packed(self) -> Mapping[str, int]: ...  # fields of codes narrower than a byte → their bits
    @property
    def signed(self) -> bool: ...  # True: it may be above 0
    def bind(self, low_G1: Tensor, rows: int) -> Low: ...
    def bytes(self, groups: int, rows: int = 1) -> int: ...
    def store(self, low_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...
    def load(self, fields: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class FloatLow:
    """A float of any sign."""

    dtype: torch.dtype = torch.float16
    packed: ClassVar[Mapping[str, int]] = {}
    signed: ClassVar[bool] = True

    def bind(self, low_G1: Tensor, rows: int) -> Low:
        return self

    def bytes(self, groups: int, rows: int = 1) -> int:
        return groups * self.dtype.itemsize

    def store(self, low_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        limits = torch.finfo(self.dtype)
        stored_G1 = low_G1.nan_to_num(0.0, posinf=limits.max, neginf=limits.min).clamp(limits.min, limits.max)
        return stored_G1.to(self.dtype).float(), {LOW: stored_G1.to(self.dtype)}

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        return fields[LOW].float()


@dataclass(frozen=True, eq=False)
class SuperLow:
    """0 or less: −code · level, the level a float16 that `run` groups of a row share (GGUF's `dmin`).

    Attributes:
        bits: of a code; run: groups under a level, 0 for all of a row.
        level_RL: set by `bind`.
    """

    bits: int
    run: int
    level_RL: Tensor | None = None
    signed: ClassVar[bool] = False

    @property
    def packed(self) -> Mapping[str, int]:
        return {LOW: self.bits} if self.bits < 8 else {}

    def bind(self, low_G1: Tensor, rows: int) -> Low:
        if self.level_RL is not None:
            return self
        top = (1 << self.bits) - 1
        return replace(self, level_RL=levels.levels(low_G1.clamp(max=0), rows, self.run, self.bits, top))

    def bytes(self, groups: int, rows: int = 1) -> int:
        return (groups * self.bits + 7) // 8 + 2 * levels.count(groups, rows, self.run)

    def store(self, low_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.level_RL is None:
            raise ValueError("minima of super-blocks share a level: bind it first")
        codes_G1 = levels.codes_of(-low_G1, self.level_RL, self.run, 0, (1 << self.bits) - 1)
        fields = {LOW: codes_G1.to(torch.uint8), SUPER_LOW: self.level_RL}
        return self.load(fields), fields

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        return 0 - levels.numbers_of(fields[LOW], fields[SUPER_LOW], self.run)
