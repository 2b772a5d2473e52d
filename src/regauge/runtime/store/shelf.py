"""Blocks of older tokens of every head in one piece of memory, as many as each head has.

Legend: B sequences, H KV heads, N blocks of each head, T tokens of a block, D channels of a head, S slots for blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from regauge.kernels.attention import Part
from regauge.runtime.store.sealing import Coding

SPARE, LEAST = 32, 4
"""For every so many blocks one more is made room for, and so many at the least."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Some blocks of keys and of values: the bytes, and a multiplier for each token or None. Leading dimensions alike.

    Attributes:
        bytes_: (..., bytes) of keys and of values.
        rows: (..., T), float32.
    """

    bytes_: tuple[Tensor, Tensor]
    rows: tuple[Tensor | None, Tensor | None]

    def flat(self) -> Blocks:
        """With one leading dimension."""
        keys, values = (held.reshape(-1, held.shape[-1]) for held in self.bytes_)
        key_rows, value_rows = (None if row is None else row.reshape(-1, row.shape[-1]) for row in self.rows)
        return Blocks((keys, values), (key_rows, value_rows))


class Shelf:
    """What a store has put away.

    Attributes:
        codings: of keys and of values.
        counts_BH: blocks of each head, int64.
        held: bytes (S, bytes) and multipliers (S, T) of every slot.
    """

    shared: ClassVar[bool] = False
    """Whether some of it is another's too."""

    def __init__(self, codings: tuple[Coding, Coding], batch: int, heads: int, device: torch.device) -> None:
        self.codings = codings
        self.counts_BH = torch.zeros(batch, heads, dtype=torch.int64, device="cpu")
        self._starts_BH, self._rooms_BH = self.counts_BH.clone(), self.counts_BH.clone()
        self._alike: tuple[int, int] | None = (0, 0)  # blocks and room of every head, where all have as many
        self._part: Part | None = None
        self.held = self.memory(0, device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose memory is another."""
        self.__dict__.update(state | {"_part": None})

    def sealed(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> Blocks:
        """(B, H, N) blocks of tokens that fill whole blocks."""
        made, lead = [], (*keys_BHTD.shape[:2], -1)
        for one, given in zip(self.codings, (keys_BHTD, values_BHTD), strict=True):
            blocks, rows = one.seal(given.reshape(-1, one.layout.tokens, given.shape[-1]))
            made.append(
                (blocks.view(*lead, blocks.shape[1]), None if rows is None else rows.view(*lead, one.layout.tokens))
            )
        return Blocks((made[0][0], made[1][0]), (made[0][1], made[1][1]))

    def memory(self, slots: int, device: torch.device) -> Blocks:
        """Room for so many blocks of each."""
        with torch.inference_mode(False):  # memory that may be written outside of inference mode too
            keys, values = (
                torch.empty(slots, coding.layout.bytes, dtype=torch.uint8, device=device) for coding in self.codings
            )
            key_rows, value_rows = (
                torch.ones(slots, coding.layout.tokens, dtype=torch.float32, device=device) if coding.balance else None
                for coding in self.codings
            )
        return Blocks((keys, values), (key_rows, value_rows))

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.codings[0].layout.tokens

    @property
    def even(self) -> bool:
        """Whether all heads hold as many blocks."""
        return not self.counts_BH.numel() or bool((self.counts_BH == self.counts_BH[0, 0]).all())

    @property
    def bytes(self) -> int:
        """Of the memory, its room and what says where blocks lie included."""
        kept = [*self.held.bytes_, *(rows for rows in self.held.rows if rows is not None)]
        kept += [self.counts_BH, self._starts_BH, self._rooms_BH]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def add(self, blocks: Blocks) -> None:
        """Puts (B, H, N, bytes) behind what every head has."""
        count = blocks.bytes_[0].shape[2]
        self._room(count)
        if self._alike is None:
            slots_BHN = (self._starts_BH + self.counts_BH).unsqueeze(-1) + _upto(count)
            self._put(slots_BHN.flatten(), blocks.flat())
        else:  # as almost always, and it is done often
            (at, room), heads = self._alike, self.counts_BH.numel()
            for memory, new in zip((*self.held.bytes_, *self.held.rows), (*blocks.bytes_, *blocks.rows), strict=True):
                if memory is not None and new is not None:
                    memory.view(heads, room, -1)[:, at : at + count] = new.view(heads, count, -1)
        self._count(count)

    def fill(self, blocks: Blocks, counts_BH: Tensor) -> None:
        """Holds only these from now on, (sum of counts, bytes): those of one head after those of another."""
        self.counts_BH = counts_BH.to(torch.int64)
        even = self.even and bool(self.counts_BH.numel())
        self._alike = (int(self.counts_BH[0, 0]),) * 2 if even else None
        self._place(self.counts_BH.clone(), blocks)

    def _place(self, rooms_BH: Tensor, blocks: Blocks) -> None:
        """New memory with what is held."""
        self._rooms_BH, self._starts_BH, self._part = rooms_BH, _starts(rooms_BH), None
        self.held = self.memory(int(rooms_BH.sum()), self.held.bytes_[0].device)
        self._put(self._slots(), blocks)

    def _count(self, more: int) -> None:
        self.counts_BH = self.counts_BH + more
        if self._alike is not None:
            self._alike = self._alike[0] + more, self._alike[1]
        if self._part is not None:  # which whoever reads it knows by its memory
            self._part.lengths_BK.add_(more * self.tokens)

    def packed(self) -> Blocks:
        """All blocks without room between them: what `fill` takes."""
        return self._get(self._slots())

    def drop(self, count: int) -> None:
        """Lets the last blocks of every head go; their room stays."""
        self._count(-count)

    def pick(self, index_B: Tensor) -> None:
        """The sequences in another order, some several times or not at all."""
        index_B = index_B.cpu()
        starts_BH, counts_BH = self._starts_BH[index_B], self.counts_BH[index_B]
        blocks = self._get(_runs(starts_BH, counts_BH))
        self.fill(blocks, counts_BH)

    def last(self) -> tuple[Tensor, Tensor]:
        """(keys, values) (B, H, T, D), float32, of the last block of every head."""
        blocks = self._get((self._starts_BH + self.counts_BH - 1).flatten())
        return self._opened(blocks, self.counts_BH.shape)

    def read(self) -> tuple[Tensor, Tensor]:
        """(keys, values), float32 (B, H, N·T, D), N of the longest head; the others end in zeros."""
        if self.even:
            return self._opened(self._get(self._slots()), self.counts_BH.shape)
        longest = int(self.counts_BH.max()) * self.tokens
        place = torch.nonzero(_upto(longest) < (self.counts_BH * self.tokens).unsqueeze(-1), as_tuple=True)
        shape = (*self.counts_BH.shape, longest)
        keys, values = (
            one.new_zeros(*shape, one.shape[-1]).index_put([axis.to(one.device) for axis in place], one)
            for one in self.runs()
        )
        return keys, values

    def held_rows(self, firsts_BH: Tensor | None, window: int) -> Tensor | None:
        """(B, H, T), bool: which rows of `read`, and of a window behind them, are tokens; None: all."""
        if self.even and firsts_BH is None:
            return None
        lengths_BH1 = (self.counts_BH * self.tokens).unsqueeze(-1)
        row_T = _upto(int(lengths_BH1.max()))
        held_BHT = row_T < lengths_BH1
        if firsts_BH is not None:
            held_BHT = held_BHT & (row_T >= firsts_BH.cpu().unsqueeze(-1))
        return torch.nn.functional.pad(held_BHT, (0, window), value=True)

    def runs(self) -> tuple[Tensor, Tensor]:
        """(keys, values), float32 (sum of tokens, D): those of one head after those of another."""
        return self._opened(self._get(self._slots()), ())

    def parts(self, firsts_BH: Tensor | None) -> tuple[Part, ...]:
        """What attention reads: nothing where no head holds a block."""
        return (self.part(firsts_BH),) if int(self.counts_BH.max()) else ()

    def part(self, firsts_BH: Tensor | None) -> Part:
        """As attention reads it. Of the memory as it is now: more blocks are told in place as long as it is the same.

        Args:
            firsts_BH: the first token of each head that counts.
        """
        if firsts_BH is None and self._part is not None:
            return self._part
        keys, values = (coding.layout for coding in self.codings)
        (key_memory, value_memory), (key_rows, value_rows) = self.held.bytes_, self.held.rows
        starts_BH = self._starts_BH.to(key_memory.device)
        made = Part(
            keys=keys,
            values=values,
            key_blocks=key_memory.flatten(),
            value_blocks=value_memory.flatten(),
            key_offsets_BK=starts_BH * keys.bytes,
            value_offsets_BK=starts_BH * values.bytes,
            lengths_BK=(self.counts_BH * self.tokens).to(starts_BH.device, torch.int32),
            firsts_BK=None if firsts_BH is None else firsts_BH.to(starts_BH.device, torch.int32).contiguous(),
            key_rows=None if key_rows is None else key_rows.flatten(),
            value_rows=None if value_rows is None else value_rows.flatten(),
            row_offsets_BK=None if key_rows is None and value_rows is None else starts_BH * self.tokens,
        )
        self._part = made if firsts_BH is None else self._part
        return made

    def _opened(self, blocks: Blocks, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(keys, values) (*lead, tokens, D)."""
        keys, values = (
            coding.open(held, rows) for coding, held, rows in zip(self.codings, blocks.bytes_, blocks.rows, strict=True)
        )
        return keys.reshape(*lead, -1, keys.shape[-1]), values.reshape(*lead, -1, values.shape[-1])

    def _slots(self) -> Tensor:
        return _runs(self._starts_BH, self.counts_BH)

    def _room(self, more: int) -> None:
        """Makes room for so many more blocks of each head."""
        if self._alike is not None:
            if self._alike[0] + more <= self._alike[1]:
                return
        elif bool((self.counts_BH + more <= self._rooms_BH).all()):
            return
        wanted_BH = self.counts_BH + more
        rooms_BH = wanted_BH + (wanted_BH // SPARE).clamp(min=LEAST)
        if self._alike is None:
            blocks, self.held = self.packed(), self.memory(0, self.held.bytes_[0].device)  # let go before new is had
            self._place(rooms_BH, blocks)
            return
        (at, room), heads, old = self._alike, self.counts_BH.numel(), self.held
        self._alike = at, int(rooms_BH[0, 0])
        self._rooms_BH, self._starts_BH, self._part = rooms_BH, _starts(rooms_BH), None
        self.held = self.memory(heads * self._alike[1], old.bytes_[0].device)
        for new, before in zip((*self.held.bytes_, *self.held.rows), (*old.bytes_, *old.rows), strict=True):
            if new is not None and before is not None:
                new.view(heads, self._alike[1], -1)[:, :at] = before.view(heads, room, new.shape[1])[:, :at]

    def _get(self, slots_S: Tensor) -> Blocks:
        slots_S = slots_S.to(self.held.bytes_[0].device)
        keys, values = (held[slots_S] for held in self.held.bytes_)
        key_rows, value_rows = (None if rows is None else rows[slots_S] for rows in self.held.rows)
        return Blocks((keys, values), (key_rows, value_rows))

    def _put(self, slots_S: Tensor, blocks: Blocks) -> None:
        slots_S = slots_S.to(self.held.bytes_[0].device)
        for memory, new in zip((*self.held.bytes_, *self.held.rows), (*blocks.bytes_, *blocks.rows), strict=True):
            if memory is not None and new is not None:
                memory[slots_S] = new


def nothing(shelf: Shelf) -> Blocks:
    """No blocks, of a shelf's sizes."""
    return shelf.memory(0, shelf.held.bytes_[0].device)


def _upto(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")


def _starts(rooms_BH: Tensor) -> Tensor:
    """The first slot of each head."""
    flat = rooms_BH.flatten()
    return (flat.cumsum(0) - flat).view_as(rooms_BH)


def _runs(starts_BH: Tensor, counts_BH: Tensor) -> Tensor:
    """The slots of one head after those of another."""
    counts, starts = counts_BH.flatten(), starts_BH.flatten()
    shift = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts)
    return shift + _upto(int(counts.sum()))
