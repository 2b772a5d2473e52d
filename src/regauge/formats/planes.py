"""Codes whose first bits are codes: one matrix that is read at 2 bits, or 3, up to all that it has.

A level is an ordinary format of integers with a step and a value of code 0 for each group, in float16. What a level's
codes alone say is that each weight lies in a cell of 2^(top − bits) codes of the whole: its step is that many steps,
and its values the middles of cells. Beside the codes stands a byte for each group of each of the coarsest levels, by
which its step is stretched about the middle of the grid and its values are moved.

Legend: O output channels, I input channels, G groups, L levels that have such a byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Step
from regauge.formats.grids import Int
from regauge.formats.lows import FloatLow, Low
from regauge.formats.nested import Float16Low
from regauge.formats.prefixes import FEWEST
from regauge.formats.scales import Float16

LEVELS = "levels"
"""The field of a step that holds the bytes, level by level within a group."""
MIDDLE, STRETCH, SHIFT = 8, 3 / 80, 3 / 80
"""Of a byte's two halves: the code of no change, and what one code changes: the step of the level of two bits (half as
much with every further bit), and where its values lie, in steps."""


@dataclass(frozen=True)
class Float16Levels:
    """The step and the value of code 0 of the whole, each in float16, and a byte for each of the coarsest levels.

    Attributes:
        count: levels that have one; the others are cut off the codes as they are.
    """

    count: int = 6
    shared: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    loose: ClassVar[None] = None
    kernel: ClassVar[None] = None
    packed: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        if not 0 <= self.count <= 6:
            raise ValueError(f"0 to 6 levels have a byte of their own, not {self.count}")

    @property
    def name(self) -> str:
        return f"f16-levels:{self.count}"

    @property
    def low(self) -> Low:
        return FloatLow()

    def bind(self, scale_G1: Tensor, grid: object, rows: int, low_G1: Tensor | None = None) -> Float16Levels:
        return self

    def bytes(self, groups: int, rows: int = 1) -> int:
        return groups * (2 + self.count)

    def store(self, scale_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        stored_G1, fields = Float16().store(scale_G1)
        if self.count:  # no change, until a rounder fits them: what is counted by `bytes` is there with every rounder
            size = (scale_G1.numel() * self.count,)
            fields |= {LEVELS: torch.full(size, MIDDLE * 17, dtype=torch.uint8, device=scale_G1.device)}
        return stored_G1, fields

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        found, bytes_ = fields["scale"], fields.get(LEVELS)
        if bytes_ is not None and (bytes_.dtype is not torch.uint8 or bytes_.numel() != self.count * found.numel()):
            raise ValueError(f"{bytes_.numel()} bytes of levels for {found.numel()} groups, each of {self.count}")
        return Float16().load(fields)


def changes(fields: Mapping[str, Tensor], bits: int) -> tuple[Tensor | float, Tensor | float]:
    """By how much the step of a level is stretched, and its values are moved, of each group (G, 1)."""
    bytes_ = fields.get(LEVELS)
    groups = fields["scale"].numel()
    if bytes_ is None or bits - FEWEST >= bytes_.numel() // groups:
        return 1.0, 0.0
    own_G1 = bytes_.view(groups, -1)[:, bits - FEWEST, None].int()
    stretch_G1 = 1 + ((own_G1 >> 4) - MIDDLE).float() * (STRETCH / 2 ** (bits - FEWEST))
    return stretch_G1, ((own_G1 & 15) - MIDDLE).float() * SHIFT


def cells(step: Step, top: int, bits: int) -> tuple[Tensor, Tensor]:
    """Step and value of code 0 (G, 1) of a level whose values are the middles of cells."""
    assert step.zero_G1 is not None, "a nested grid has a zero point"
    wide = 1 << (top - bits)
    low_G1 = -step.zero_G1 * step.scale_G1
    return step.scale_G1 * wide, low_G1 + step.scale_G1 * ((wide - 1) / 2)


def level_format(fmt: Format, bits: int) -> Format:
    """What the first bits of a nested format are."""
    return Format(Int(bits, False), fmt.grain, fmt.ranger, Float16Low())


def level_step(step: Step, fmt: Format, bits: int) -> Step:
    """Steps and values of code 0 of a level, as an ordinary artifact stores them."""
    scale_G1, low_G1 = cells(step, fmt.grid.bits, bits)
    stretch, shift = changes(step.fields, bits)
    half = ((1 << bits) - 1) / 2
    low_G1 = low_G1 + scale_G1 * (shift + (1 - stretch) * half)
    fields = Float16().store(scale_G1 * stretch)[1] | FloatLow().store(low_G1)[1]
    return level_format(fmt, bits).load(fields)


def level(codes: Codes, fmt: Format, bits: int) -> tuple[Codes, Format]:
    """A matrix at fewer bits, as an ordinary one of that many.

    Raises:
        ValueError: it has no such level.
    """
    if fmt.grid.coarsest is None or not fmt.grid.coarsest <= bits <= fmt.grid.bits:
        raise ValueError(f"codes of {fmt.grid.name} have no level of {bits} bits")
    if bits == fmt.grid.bits:
        step = fmt.load({name: tensor for name, tensor in codes.step.fields.items() if name != LEVELS})
        return replace(codes, step=step), level_format(fmt, bits)
    return replace(codes, codes_OI=codes.codes_OI >> (fmt.grid.bits - bits), step=level_step(codes.step, fmt, bits)), (
        level_format(fmt, bits)
    )
