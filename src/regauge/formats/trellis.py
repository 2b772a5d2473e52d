"""Grids of runs of weights: neighbours share bits, so that what a weight may be depends on those before it.

Legend: … any leading dimensions, K weights of whole words, R weights of a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regauge.formats.codebooks import BOOKS, Book
from regauge.formats.grid import Packed
from regauge.kernels.cpu import trellis
from regauge.kernels.cpu.sweep import Values

WORD = 64
"""Bits that windows share: one word of the machine, circular."""
WINDOWS = {2: 7, 3: 5, 4: 7}
"""Bits of a weight → the window that is taken where none is named."""


@dataclass(frozen=True)
class Trellis(Packed):
    """A trained code book of 128 values read by windows that overlap (bitshift trellis: QTIP, arXiv 2406.11235).

    A weight brings `bits` bits of its own: `plain` of them, the high ones, are read by it alone; the others lie in a
    circular word of 64 bits. Its value is the entry of the table at its plain bits and the `window` bits of the word
    that end with its own: its neighbours' bits before it choose with it. So each weight picks from many more values
    than its bits could say, and the codes of a word are a path, found by Viterbi's algorithm. At 2 bits a unit Gaussian
    keeps 0.085 of its variance as error, where the best grid of single weights keeps 0.1175.

    Values are k / unit with k whole numbers of a byte, all different, so a value says which window it came from. They
    suit weights of deviation 1: the ranger `deviation` finds such steps.

    Differs: QTIP computes values from windows of 16 bits; here a window of 7 is looked up, because two registers hold
    the table on a CPU. Words close on themselves, as QTIP's do, but each on one row and on `run` inputs alone.

    Attributes:
        bits: of a weight, those counted and stored: 2, 3 or 4.
        window: bits that choose with the plain ones.
        plain: bits of a weight that no neighbour reads.
    """

    bits: int
    window: int
    plain: int = 0

    def __post_init__(self) -> None:
        if (self.bits, self.window, self.plain) not in BOOKS:
            raise ValueError(f"there is no table for windows of {self.window} at {self.bits} bits")

    @property
    def name(self) -> str:
        return f"trellis{self.bits}" + ("" if self.window == WINDOWS[self.bits] else f":{self.window}")

    @property
    def kind(self) -> str:
        return "trellis"

    @property
    def run(self) -> int:
        """Weights of a word."""
        return WORD // self.fresh

    @property
    def fresh(self) -> int:
        """Bits of a weight that its neighbours read too."""
        return self.bits - self.plain

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def offset(self) -> int:
        return 0

    @property
    def cast(self) -> torch.dtype | None:
        return None

    @property
    def low(self) -> float:
        return float(self.table.min())

    @property
    def high(self) -> float:
        return float(self.table.max())

    @property
    def kernel(self) -> Values | None:
        return None

    @property
    def book(self) -> Book:
        return BOOKS[self.bits, self.window, self.plain]

    @cached_property
    def table(self) -> Tensor:
        """The value of every window, its plain bits above it."""
        return torch.tensor(self.book.table, dtype=torch.float32, device="cpu") / self.book.unit

    @cached_property
    def paths(self) -> trellis.Shape:
        """What the C++ kernels must know."""
        return trellis.Shape(self.table, self.window, self.fresh, self.plain, self.run, self.book.unit)

    @cached_property
    def _entries(self) -> Tensor:
        """Place in the table of each byte that is there, 0 elsewhere."""
        found = torch.zeros(256, dtype=torch.int64, device="cpu")
        places = torch.tensor(self.book.table, dtype=torch.int64, device="cpu") + 128
        found[places] = torch.arange(len(places), dtype=torch.int64, device="cpu")
        return found

    def snap(self, z: Tensor) -> Tensor:
        """The values of the path nearest to z; words lie along the last axis.

        Raises:
            ValueError: it is not whole words long.
        """
        return trellis.snapped(self._words(z), self.paths).view(z.shape).to(z.dtype)

    def encode(self, z: Tensor) -> Tensor:
        entry = self._entries.to(z.device)[(z * self.book.unit).round().long().clamp_(-128, 127) + 128]
        own = (entry & ((1 << self.window) - 1)) >> (self.window - self.fresh)
        return (entry >> self.window << self.fresh | own).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Grid values, float32, of codes; words lie along the last axis."""
        return self.table.to(codes.device)[trellis.entries(self._words(codes), self.paths)].view(codes.shape)

    def _words(self, x: Tensor) -> Tensor:
        """(…, R) of words."""
        if x.shape[-1] % self.run:
            raise ValueError(f"words of {self.run} weights do not divide a run of {x.shape[-1]}")
        return x.reshape(-1, self.run)


def Two(window: int = WINDOWS[2]) -> Trellis:
    """Two bits: windows of 7 read by two bits a weight, or windows of 6 by one, and one plain bit."""
    return Trellis(2, window, 1 if window == 6 else 0)


def Three(window: int = WINDOWS[3]) -> Trellis:
    """Three bits: windows of 5 read by one bit a weight, and two plain bits."""
    return Trellis(3, window, 2)


def Four(window: int = WINDOWS[4]) -> Trellis:
    """Four bits: windows of 7 read by four bits a weight."""
    return Trellis(4, window)
