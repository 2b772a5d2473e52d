"""Grids of code words: neighbours are rounded together to one row of a list of magnitudes, each with a sign.

Legend: W words, R weights of a word, P pieces of a word that are rows of the list, L rows of the list, C weights of a
row.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.grid import Packed
from regauge.formats.magnitudes import LISTS, SIZES
from regauge.kernels.cpu import lists
from regauge.kernels.cpu.sweep import Values
from regauge.kernels.reference import pack, packed_bytes, unpack

RUN = 8
"""Weights of a word: those that share the sign bits of a byte."""
AT_ONCE = 1 << 13
"""Words whose distances to all rows are held together."""
MOST = 1e4
"""What no magnitude reaches, and squares do not overflow."""


@dataclass(frozen=True)
class CodeWords(Packed):
    """GGUF's IQ2 and IQ3 types: rows of a list of magnitudes, and a sign for each weight.

    Of all words that magnitudes and signs could make only those of the list exist, so a word costs the bits of a place
    in it. With `even` signs the number of negative ones is even and the last is not stored: where it is odd, the weight
    of the least (weighted) size gives way, as llama.cpp does, and the row is found for what it became.

    In memory a code stands for one weight's value, the magnitude and the sign, so kernels of short tables multiply it;
    `stored` packs whole words to the bits that the type has.

    Attributes:
        name: which list.
        even: whether signs of a word are even in number, so that seven say all eight.
    """

    name: str
    even: bool
    run: ClassVar[int] = RUN
    paths: ClassVar[None] = None
    kind: ClassVar[str] = "table"
    symmetric: ClassVar[bool] = True
    offset: ClassVar[int] = 0
    cast: ClassVar[None] = None
    kernel: ClassVar[Values | None] = None

    @property
    def bits(self) -> int:  # type: ignore[override]  # read alone: which list it is says it
        """Of a code in memory; on disk a weight has `row_bytes`."""
        return 3 if len(SIZES[self.name]) == 3 else 4

    @property
    def low(self) -> float:
        return -float(SIZES[self.name][-1])

    @property
    def high(self) -> float:
        return float(SIZES[self.name][-1])

    @cached_property
    def table(self) -> Tensor:
        """The values in rising order: negative magnitudes, then positive ones."""
        sizes = torch.tensor(SIZES[self.name], dtype=torch.float32, device="cpu")
        return torch.cat([-sizes.flip(0), sizes])

    @cached_property
    def keys(self) -> Tensor:
        """(L,), int16: the rows as their 16 bits, the first weight's place lowest."""
        raw = torch.tensor(list(base64.b85decode(LISTS[self.name])), dtype=torch.uint8, device="cpu")
        return raw.view(torch.int16)

    @cached_property
    def places(self) -> Tensor:
        """(L, C), int64: the place of each weight's magnitude among the sizes."""
        row_L = self.keys.long() & 0xFFFF
        width = 2 if len(SIZES[self.name]) == 3 else 4
        return row_L[:, None] >> torch.arange(0, 16, width, dtype=torch.int64, device="cpu") & (1 << width) - 1

    @cached_property
    def rows(self) -> Tensor:
        """(L, C), float32: the list."""
        return torch.tensor(SIZES[self.name], dtype=torch.float32, device="cpu")[self.places]

    @cached_property
    def _index(self) -> Tensor:
        """The row of every 16 bits that are one, 0 elsewhere."""
        found = torch.zeros(1 << 16, dtype=torch.int64, device="cpu")
        found[self._keys(self.places)] = torch.arange(len(self.places), dtype=torch.int64, device="cpu")
        return found

    @cached_property
    def _list(self) -> lists.Words:
        """As the kernels take it."""
        return lists.Words(self.keys, self.table[len(SIZES[self.name]) :], self.rows.shape[1], self.even)

    @property
    def _wide(self) -> int:
        """Bits of a place in the list."""
        return (len(self.places) - 1).bit_length()

    def _keys(self, places_NC: Tensor) -> Tensor:
        width = 16 // places_NC.shape[1]
        return (places_NC << torch.arange(0, 16, width, dtype=torch.int64, device=places_NC.device)).sum(1)

    def snap(self, z: Tensor) -> Tensor:
        return self.near(z)

    def near(self, z: Tensor, weight: Tensor | None = None) -> Tensor:
        """The values of the words nearest to z, each element's square counted by `weight` ≥ 0.

        Raises:
            ValueError: z is not whole words long.
        """
        weight_WR = None if weight is None else self._words(weight.expand(z.shape)).float()
        z_WR = self._words(z).float()
        quick_WR = lists.near(z_WR, weight_WR, self._list)
        if quick_WR is not None:
            return quick_WR.view(z.shape).to(z.dtype)
        z_WR = z_WR.nan_to_num(posinf=MOST, neginf=-MOST).clamp(-MOST, MOST)
        found_WR = torch.empty_like(z_WR)
        for start in range(0, len(z_WR), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            found_WR[part] = self._nearest(z_WR[part], None if weight_WR is None else weight_WR[part])
        return found_WR.view(z.shape).to(z.dtype)

    def _nearest(self, z_WR: Tensor, weight_WR: Tensor | None) -> Tensor:
        size_WR, sign_WR = z_WR.abs(), torch.where(z_WR < 0, -1.0, 1.0)
        counted_WR = size_WR if weight_WR is None else size_WR * weight_WR
        if self.even:
            odd_W = sign_WR.prod(1) < 0
            least_WR = torch.nn.functional.one_hot(counted_WR.argmin(1), RUN).bool() & odd_W[:, None]
            sign_WR = torch.where(least_WR, -sign_WR, sign_WR)
            counted_WR = torch.where(least_WR, -counted_WR, counted_WR)
        rows_LC = self.rows.to(z_WR.device)
        width = rows_LC.shape[1]
        square_LC = rows_LC.square()
        counted_NC = counted_WR.reshape(-1, width)
        if weight_WR is None:
            far_NL = torch.addmm(square_LC.sum(1), counted_NC, rows_LC.T, alpha=-2)
        else:
            far_NL = torch.addmm(weight_WR.reshape(-1, width) @ square_LC.T, counted_NC, rows_LC.T, alpha=-2)
        return rows_LC[far_NL.argmin(1)].view(z_WR.shape) * sign_WR

    def encode(self, z: Tensor) -> Tensor:
        table = self.table.to(z.device, torch.float32)
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize(z.float(), middles).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return self.table.to(codes.device)[codes.int()]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a packed row of so many weights."""
        signs = packed_bytes(columns // RUN, 7 if self.even else 8)
        rows = columns // self.rows.shape[1]
        return signs + rows + (packed_bytes(rows, self._wide - 8) if self._wide > 8 else 0)

    def words(self, codes_OI: Tensor) -> tuple[Tensor, Tensor]:
        """The place in the list of every row, and the signs of every word as bits, the first lowest; int64."""
        rows, columns = codes_OI.shape
        count, width = len(SIZES[self.name]), self.rows.shape[1]
        codes = codes_OI.long()
        negative = codes < count
        places = torch.where(negative, count - 1 - codes, codes - count)
        index = self._index.to(codes.device)[self._keys(places.view(-1, width))].view(rows, columns // width)
        signs = (negative.view(-1, RUN).long() << _EIGHT.to(codes.device)).sum(1).view(rows, columns // RUN)
        return index, signs

    def stored(self, codes_OI: Tensor) -> Tensor:
        """Packed rows: the low byte of each place in the list, its other bits, and the signs."""
        index, signs = self.words(codes_OI)
        planes = [(index & 255).to(torch.uint8)]
        if self._wide > 8:
            planes.append(pack((index >> 8).to(torch.uint8), self._wide - 8))
        planes.append(pack((signs & (127 if self.even else 255)).to(torch.uint8), 7 if self.even else 8))
        return torch.cat(planes, 1)

    def read(self, packed_OB: Tensor, columns: int) -> Tensor:
        """Codes (O, I) again.

        Raises:
            ValueError: the rows do not have that many bytes.
        """
        if packed_OB.dtype is not torch.uint8 or packed_OB.ndim != 2 or packed_OB.shape[1] != self.row_bytes(columns):
            raise ValueError(f"packed rows of {self.name} have {self.row_bytes(columns)} bytes of {columns} weights")
        many, more = columns // self.rows.shape[1], self._wide - 8
        index = packed_OB[:, :many].long()
        after = many + (packed_bytes(many, more) if more else 0)
        if more:
            index |= unpack(packed_OB[:, many:after].contiguous(), more, many).long() << 8
        signs = unpack(packed_OB[:, after:].contiguous(), 7 if self.even else 8, columns // RUN).long()
        negative = (signs[:, :, None] >> _EIGHT.to(signs.device)) & 1
        if self.even:
            negative[:, :, -1] = negative.sum(2) & 1
        places, count = self.places.to(index.device)[index].flatten(1), len(SIZES[self.name])
        return torch.where(negative.flatten(1) > 0, count - 1 - places, count + places).to(torch.uint8)

    def _words(self, x: Tensor) -> Tensor:
        if x.shape[-1] % RUN:
            raise ValueError(f"words of {RUN} weights do not divide a run of {x.shape[-1]}")
        return x.reshape(-1, RUN)


_EIGHT = torch.arange(RUN, dtype=torch.int64, device="cpu")


@lru_cache
def IQ2XXS() -> CodeWords:
    """256 rows of eight magnitudes 8, 25, 43, and seven signs: 15 bits for eight weights."""
    return CodeWords("iq2-xxs", True)


@lru_cache
def IQ2XS() -> CodeWords:
    """512 rows of eight magnitudes 8, 25, 43, and seven signs: 2 bits a weight."""
    return CodeWords("iq2-xs", True)


@lru_cache
def IQ2S() -> CodeWords:
    """1024 rows of eight magnitudes 8, 25, 43, and eight signs: 2.25 bits a weight."""
    return CodeWords("iq2-s", False)


@lru_cache
def IQ3XXS() -> CodeWords:
    """256 rows of four magnitudes from 4 to 62, and seven signs for eight weights: 2.875 bits a weight."""
    return CodeWords("iq3-xxs", True)


@lru_cache
def IQ3S() -> CodeWords:
    """512 rows of four magnitudes from 1 to 15, odd ones, and eight signs for eight: 3.25 bits a weight."""
    return CodeWords("iq3-s", False)
