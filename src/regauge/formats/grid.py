"""What a grid is asked, and what it answers where each weight has a code of its own, stored as it is.

Legend: O output channels, I input channels, B bytes of a packed row.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.kernels.cpu.sweep import Values
from regauge.kernels.cpu.trellis import Shape
from regauge.kernels.reference import pack, packed_bytes, unpack


@runtime_checkable
class Grid(Protocol):
    """Which numbers exist. Idempotent. Monotone where `run` is 1; else whole runs along the last axis go together."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...  # integer, float or table: what decides which kernels multiply it
    @property
    def bits(self) -> int: ...  # stored bits an element
    @property
    def run(self) -> int: ...  # neighbouring elements that are rounded together; 1: each alone
    @property
    def paths(self) -> Shape | None: ...  # where run > 1: what the kernels must know to round such runs
    @property
    def symmetric(self) -> bool: ...  # True: no zero point is stored
    @property
    def offset(self) -> int: ...  # of integers: value = code - offset
    @property
    def cast(self) -> torch.dtype | None: ...  # torch's dtype of the same bytes, where there is one
    @property
    def low(self) -> float: ...  # least grid value
    @property
    def high(self) -> float: ...  # greatest grid value
    @property
    def table(self) -> Tensor: ...  # the values, float32, by code (of runs: by entry); NaN for one never written
    @property
    def kernel(self) -> Values | None: ...  # what the C++ kernels must know to round to it; None: torch rounds
    @property
    def coarsest(self) -> int | None: ...  # bits of the first bits that are codes themselves; None: only all are
    @property
    def width(self) -> int: ...  # bits of a weight on disk, to the nearest whole number

    def snap(self, z: Tensor) -> Tensor:
        """The nearest grid value, same shape and dtype; saturates outside [low, high]."""

    def encode(self, z: Tensor) -> Tensor:
        """Codes 0 … 2^bits − 1, uint8, of values that are on the grid."""

    def decode(self, codes: Tensor) -> Tensor:
        """Grid values, float32, of codes."""

    def near(self, z: Tensor, weight: Tensor | None = None) -> Tensor: ...  # as `snap`; of runs by errors that count
    def row_bytes(self, columns: int) -> int: ...  # of a row as it is stored
    def stored(self, codes_OI: Tensor) -> Tensor: ...  # codes as they are stored
    def read(self, packed_OB: Tensor, columns: int) -> Tensor: ...  # codes_OI again


class Packed:
    """Codes are packed to the grid's bits, all weights count alike, and all bits of a code are read."""

    bits: int
    coarsest: ClassVar[int | None] = None

    def snap(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def near(self, z: Tensor, weight: Tensor | None = None) -> Tensor:
        """Grid values nearest to z. Where each weight is rounded alone it does not matter how much it counts."""
        return self.snap(z)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a packed row of so many weights."""
        return packed_bytes(columns, self.bits)

    @property
    def width(self) -> int:
        """Bits of a weight on disk, to the nearest whole number."""
        return round(self.row_bytes(1024) / 128)

    def stored(self, codes_OI: Tensor) -> Tensor:
        """Codes as they are stored, (O, B) where nothing else is said."""
        return pack(codes_OI, self.bits)

    def read(self, packed_OB: Tensor, columns: int) -> Tensor:
        """codes_OI of what is stored."""
        return unpack(packed_OB, self.bits, columns)


class Single(Packed):
    """Each weight is rounded alone."""

    run: ClassVar[int] = 1
    paths: ClassVar[None] = None
