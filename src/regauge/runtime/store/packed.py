"""A store whose older tokens are blocks of bytes, and whose newest are whole: what a `cache` rule keeps of one block.

    store = Packed(scheme)
    store.append(keys_BHTD, values_BHTD)    # what attention reads: all before in its codes, and these as they came
    store.parts()                           # for the native step, which reads the codes

How many tokens lie in blocks is a function of how many were seen alone (`Scheme.sealed`), so the same keys and values
make the same codes in whatever pieces they come. After tokens are taken back, what is sealed stays so, and only a block
that is cut is opened again. Nothing is sealed while a rollback is recorded, nor between `hold` and `release`.

Legend: B sequences, H KV heads, T tokens, D head size, K tokens that a head keeps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from regauge.cache.scheme import Scheme, behind
from regauge.kernels.attention import Part
from regauge.runtime.store.growing import Growing, new_stamp, with_room
from regauge.runtime.store.sealing import codings, turned
from regauge.runtime.store.shelf import Blocks, Shelf, nothing

SLACK = 32
"""Rows of a window's memory are made in multiples of this, and half of it is free: what the native step brings."""
Rows = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""(keys_KD, values_KD) of every head of every sequence."""


class Packed(Growing):
    """A store by a scheme.

    Attributes:
        scheme, tokens: how they are put away, and how many in a block.
        length: tokens seen.
        origin: how many of them are behind the window: row 0 of the memory is token `origin`.
        record_past: nothing is sealed until the next `keep`, which settles how much of the text stays.
        kept_at: tokens seen at the last `keep` or `record`.
        holding: nothing is sealed.
        chosen: whether tokens were let go.
        least: no rollback goes back behind so many tokens.
        firsts_BH: how many tokens of each head's blocks are padding, in front; None: as the mask says.
        beside: what a policy keeps with the store, B first: it goes where the sequences go.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.tokens = scheme, scheme.tokens
        self.record_past = self.holding = False
        self.beside: dict[str, Tensor] = {}
        self._empty()
        super().__init__()

    def _empty(self) -> None:
        self.shelf: Shelf | None = None
        self.firsts_BH: Tensor | None = None
        self.kept_at, self.least, self.chosen = 0, 0, False

    @property
    def hadamard(self) -> tuple[bool, bool]:
        return self.scheme.hadamard, self.scheme.hadamard

    def record(self) -> None:
        """Until the next `keep` all that comes can be taken back as it came."""
        self.record_past, self.kept_at = True, self.length

    def hold(self) -> None:
        """Seals nothing until `release`."""
        self.holding = True

    def release(self) -> None:
        """Seals what is due."""
        self.holding = False
        self.settle()

    def append(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens, and gives what attention reads: those before as they are held, the new ones as they came.

        Where heads hold unequal numbers, `held` says which rows are tokens.
        """
        found = self.extend(keys_BHTD, values_BHTD)
        self.settle()
        return found

    def extend(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """As `append`, before anything is sealed: `settle` does that."""
        first, new = self.length == 0, keys_BHTD.shape[-2]
        self.reserve(new, keys_BHTD, values_BHTD)
        self._write(*self._turned(keys_BHTD, values_BHTD))
        if first:
            return keys_BHTD, values_BHTD
        keys, values = self.read()
        keys[:, :, -new:], values[:, :, -new:] = keys_BHTD, values_BHTD
        return keys, values

    def take(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Adds new tokens, for whoever reads nothing now."""
        self.reserve(keys_BHTD.shape[-2], keys_BHTD, values_BHTD)
        self._write(*self._turned(keys_BHTD, values_BHTD))
        self.settle()

    def read(self) -> tuple[Tensor, Tensor]:
        """(keys, values) (B, H, T, D) of all that is held, the oldest first, in the coordinates that they came in; new
        memory.

        Raises:
            ValueError: nothing was ever held.
        """
        window = [memory[:, :, : self.rows] for memory in self.memory]
        if self.shelf is None:
            older = [memory[:, :, :0] for memory in window]
        else:
            older = [old.to(memory.dtype) for old, memory in zip(self.shelf.read(), window, strict=True)]
        keys, values = (torch.cat(pair, 2) for pair in zip(older, window, strict=True))
        return self._turned(keys, values)

    @property
    def held(self) -> Tensor | None:
        """(B, H, T), bool: which rows of `read` are tokens; None: all of them."""
        return None if self.shelf is None else self.shelf.held_rows(self.firsts_BH, self.rows)

    def parts(self, starts: Sequence[int] = ()) -> tuple[Part, ...]:
        """What attention reads of the older tokens.

        Args:
            starts: the first token of each sequence that counts (padding on the left), as of the text.
        """
        if self.shelf is None:
            return ()
        firsts_BH = self.firsts_BH
        if not self.chosen and any(starts):
            start_B = torch.tensor(list(starts), dtype=torch.int64, device="cpu").clamp(max=self.origin)
            firsts_BH = start_B.unsqueeze(1).expand_as(self.shelf.counts_BH)
        return self.shelf.parts(firsts_BH)

    @property
    def settled(self) -> int:
        """Tokens that no rollback reaches."""
        return min(self.kept_at, self.length) if self.record_past else self.length

    def settle(self) -> None:
        """Seals what is due."""
        if due := self.due:
            self.put(self.shelve().sealed(*(memory[:, :, :due] for memory in self.memory)), due)

    @property
    def due(self) -> int:
        return 0 if self.holding else max(0, self._sealed(self.settled) - self.origin)

    def put(self, blocks: Blocks, due: int) -> None:
        """Takes blocks for the first `due` tokens of the window."""
        self.shelve().add(blocks)
        self._slide(due)

    def _sealed(self, seen: int) -> int:
        """How many of so many lie in blocks: as the scheme says, and where tokens are let go, though whole, as well."""
        return behind(seen, self.scheme.window, self.tokens) if self._slides else 0

    def shelve(self) -> Shelf:
        """Where its blocks lie, or will."""
        if self.shelf is None:
            (batch, heads), device = self.memory[0].shape[:2], self.memory[0].device
            self.shelf = Shelf(codings(self.scheme, *self.memory), batch, heads, device)
        return self.shelf

    def _slide(self, gone: int) -> None:
        """The first rows are in blocks now: the others come to the front, in smaller memory where they are few."""
        rows = self.rows - gone
        self.origin += gone
        if self.room > rows + self.tokens + 3 * SLACK:
            keys, values = (memory[:, :, gone : gone + rows] for memory in self.memory)
            self.house(self.roomy(keys, rows), self.roomy(values, rows))
            return
        for memory in self.memory:
            memory[:, :, :rows] = memory[:, :, gone : gone + rows].clone()
        self.stamp = new_stamp()

    def roomy(self, held: Tensor, tokens: int) -> Tensor:
        """What is held in new memory with room for so many tokens and a few more: a window does not grow for long."""
        return with_room(held, tokens, SLACK) if self._slides else super().roomy(held, tokens)

    def _grown(self, wanted: int) -> int:
        return wanted if self._slides else super()._grown(wanted)

    @property
    def _slides(self) -> bool:
        """Whether older tokens leave the window."""
        return self.chosen or self.scheme.keys is not None or self.scheme.values is not None

    def replace(self, older: Rows, firsts_BH: Tensor | None = None, window: int | None = None) -> None:
        """Lets go of all older tokens, and holds these instead: what a policy has chosen, or made of them.

        Args:
            older: of every head of every sequence, whole blocks, in the coordinates that keys and values come in.
            firsts_BH: how many of them, in front, are padding.
            window: newest tokens that are not older ones; None: those that are in no block.

        Raises:
            ValueError: they are no whole blocks, or the window holds fewer.
        """
        window = self.rows if window is None else window
        tokens = self.tokens
        counts_BH = torch.tensor([[len(keys) for keys, _ in row] for row in older], dtype=torch.int64, device="cpu")
        if bool((counts_BH % tokens).any()) or not 0 <= window <= self.rows or (self.length - window) % tokens:
            raise ValueError(
                f"heads keep whole blocks of {tokens} tokens before a window of {window} of {self.length}, not "
                f"{counts_BH.tolist()}"
            )
        shelf = self.shelve()
        if int(counts_BH.sum()):
            flat = list(itertools.chain.from_iterable(older))
            pair = self._turned(torch.cat([keys for keys, _ in flat]), torch.cat([values for _, values in flat]))
            made = shelf.sealed(*(one[None, None] for one in pair)).flat()
        else:
            made = nothing(shelf)
        shelf.fill(made, counts_BH // tokens)
        self.chosen, self.firsts_BH = True, firsts_BH
        if self.rows > window:
            self._slide(self.rows - window)
        self.least, self.stamp = self.origin, new_stamp()

    def evict(self, kept: Sequence[Sequence[Tensor]], firsts_BH: Tensor | None = None) -> int:
        """Keeps only some of the tokens that are in blocks, and gives the bytes that are free now.

        Args:
            kept: of every head of every sequence, rows of its blocks (int64), in the order that they are to lie in;
                whole blocks of them.
            firsts_BH: how many of them, in front, are padding.

        Raises:
            ValueError: they are no whole blocks.
        """
        if self.shelf is None:
            return 0
        before, (keys, values) = self.bytes, self._turned(*self.shelf.runs())
        sizes = (self.shelf.counts_BH * self.shelf.tokens).flatten()
        first = (sizes.cumsum(0) - sizes).view_as(self.shelf.counts_BH).tolist()
        pairs = [zip(*pair, strict=True) for pair in zip(first, kept, strict=True)]
        self.replace([[(keys[at + index], values[at + index]) for at, index in row] for row in pairs], firsts_BH)
        return before - self.bytes

    def keep(self, length: int) -> None:
        """Takes the last tokens back, so that `length` have been seen; of a block that is cut, what stays is opened.

        Raises:
            ValueError: there were never so many.
            RuntimeError: tokens before them were let go.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"a store of {self.length} tokens cannot go back to {length}")
        if length < self.least:
            raise RuntimeError(
                f"the last {self.length - length} tokens cannot be taken back: a policy has let go of tokens among the "
                f"first {self.least}, and which of them were read by then is not kept."
            )
        if length < self.origin:
            self._open(length)
        self.length = self.kept_at = length
        self.settle()

    def _open(self, length: int) -> None:
        """Brings the tokens of the block that holds the last one back into the window."""
        assert self.shelf is not None
        origin = length // self.tokens * self.tokens
        self.shelf.drop((self.origin - origin) // self.tokens - 1)
        rows = [one[:, :, : length - origin] for one in self.shelf.last()]
        self.shelf.drop(1)
        self.origin, self.length = origin, length
        memories = zip(rows, self.memory, strict=True)
        self.house(*(self.roomy(row.to(memory.dtype), length - origin) for row, memory in memories))

    def reorder(self, index_B: Tensor) -> None:
        """The sequences in another order, some of them several times or not at all."""
        super().reorder(index_B)
        if self.shelf is not None:
            self.shelf.pick(index_B)
        if self.firsts_BH is not None:
            self.firsts_BH = self.firsts_BH[index_B.to(self.firsts_BH.device)]
        self.beside = {name: kept[index_B.to(kept.device)] for name, kept in self.beside.items()}

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._empty()
        self.beside = {}

    @property
    def bytes(self) -> int:
        """Of the memory, its room included."""
        return super().bytes + (0 if self.shelf is None else self.shelf.bytes)

    def _turned(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Into the store's coordinates, and out of them: a Hadamard is its own inverse."""
        if not self.scheme.hadamard:
            return keys, values
        return turned(keys.shape[-1])(keys), turned(values.shape[-1])(values)
