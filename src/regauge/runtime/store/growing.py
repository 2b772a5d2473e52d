"""What one block keeps of the past: keys and values in one piece of memory with room to grow, over plain tensors.

A new token is written in place and nothing is copied, and the native step reads the same memory. A store behind a
sliding window keeps the window and a quarter more at most: when that is full the window moves to its front.

Legend: B sequences, H KV heads, T tokens, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regauge.kernels.attention import Part

ROOM = 256
"""Tokens of room are made in multiples of this."""
LEAST = 16
"""And behind a window of a quarter of it, but of so many at least: what one call of the native step brings."""
CHUNK = 256
"""Rows that attention of the native step adds up at a time; new ones come to the last."""
_stamps = itertools.count(1)


def new_stamp() -> int:
    """A number that no memory of this process had."""
    return next(_stamps)


class Growing:
    """A store that keeps everything.

    Attributes:
        length: tokens seen.
        origin: tokens seen that are held no more: row 0 of the memory is token `origin`.
        keys_BHTD, values_BHTD: the memory, T with the room.
        room: tokens that the memory holds.
        stamp: the number of the memory and of its origin: no two of a process are the same.
    """

    def __init__(self) -> None:
        self.keys_BHTD: Tensor | None = None
        self.values_BHTD: Tensor | None = None
        self.length = self.room = self.origin = 0
        self.stamp = new_stamp()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose memory is another."""
        self.__dict__.update(state)
        self.stamp = new_stamp()

    @property
    def rows(self) -> int:
        """Tokens held."""
        return self.length - self.origin

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        """(keys, values), the memory with its room.

        Raises:
            ValueError: nothing was ever held.
        """
        if self.keys_BHTD is None or self.values_BHTD is None:
            raise ValueError("an empty store has no keys")
        return self.keys_BHTD, self.values_BHTD

    @property
    def keys(self) -> Tensor | None:
        """(B, H, T, D) of the tokens held: a view."""
        return None if self.keys_BHTD is None else self.keys_BHTD[:, :, : self.rows]

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self.keys_BHTD = None
        elif not _begins(self.keys_BHTD, tensor):
            self.house(keys=self.roomy(tensor, tensor.shape[-2]))

    @property
    def values(self) -> Tensor | None:
        """(B, H, T, D) of the tokens held: a view."""
        return None if self.values_BHTD is None else self.values_BHTD[:, :, : self.rows]

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self.values_BHTD = None
        elif not _begins(self.values_BHTD, tensor):
            self.house(values=self.roomy(tensor, tensor.shape[-2]))
        # whoever replaces them sets keys, then values
        self.length = 0 if tensor is None else self.origin + tensor.shape[-2]

    def house(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Takes new memory."""
        self.keys_BHTD = self.keys_BHTD if keys is None else keys
        self.values_BHTD = self.values_BHTD if values is None else values
        memory = self.keys_BHTD if self.keys_BHTD is not None else self.values_BHTD
        self.room = 0 if memory is None else memory.shape[2]
        self.stamp = new_stamp()

    def append(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens, and gives what the first of them looks back to, and theirs."""
        self.reserve(keys_BHTD.shape[-2], keys_BHTD, values_BHTD)
        self._write(keys_BHTD, values_BHTD)
        assert self.keys_BHTD is not None
        assert self.values_BHTD is not None
        return self.keys_BHTD[:, :, : self.rows], self.values_BHTD[:, :, : self.rows]

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Behind what is held; there is room."""
        assert self.keys_BHTD is not None
        assert self.values_BHTD is not None
        start, new = self.rows, keys.shape[-2]
        self.keys_BHTD[:, :, start : start + new] = keys
        self.values_BHTD[:, :, start : start + new] = values
        self.length += new

    def reserve(self, new: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Makes room for `new` more tokens; `keys` and `values` tell sizes where nothing is held yet."""
        rows = self.rows
        wanted = rows + new
        if self.keys_BHTD is None or self.values_BHTD is None:
            assert keys is not None
            assert values is not None
            self.house(self.roomy(keys[:, :, :0], wanted), self.roomy(values[:, :, :0], wanted))
        elif self.room < wanted:
            grown = self._grown(wanted)
            keys_BHTD, values_BHTD = self.keys_BHTD[:, :, :rows], self.values_BHTD[:, :, :rows]
            self.house(self.roomy(keys_BHTD, grown), self.roomy(values_BHTD, grown))

    def _grown(self, wanted: int) -> int:
        """Tokens that new memory is made for, where it must hold so many."""
        return max(wanted, self.rows * 3 // 2)

    @property
    def hadamard(self) -> tuple[bool, bool]:
        """Whether keys, and values, are held in coordinates turned by a Hadamard of the head's size."""
        return False, False

    def parts(self, starts: Sequence[int] = ()) -> tuple[Part, ...]:
        """What is held of older tokens otherwise than in rows: nothing.

        Args:
            starts: the first token of each sequence that counts.
        """
        return ()

    @property
    def due(self) -> int:
        """Tokens, the oldest of the window, that are to be sealed: none."""
        return 0

    def roomy(self, held: Tensor, tokens: int) -> Tensor:
        """What is held in new memory with room for so many tokens and some more."""
        return with_room(held, tokens)

    def reset(self) -> None:
        """Forgets everything."""
        self.keys_BHTD = self.values_BHTD = None
        self.length = self.room = self.origin = 0
        self.stamp = new_stamp()

    def together(self, most: int) -> int:
        """How many tokens, of `most`, may come at once so that each reads, bit for bit, what it would read alone: none
        comes to another chunk of rows than the first, and nothing is sealed before the last. Windows that slide are not
        counted on: there the last bits of sums depend on where a window begins."""
        most = min(most, CHUNK - (self.rows - 1) % CHUNK) if self.rows else most
        found, sealed = 1, self._sealed(self.length)
        while found < most and self._sealed(self.length + found) == sealed:
            found += 1
        return found

    def _sealed(self, seen: int) -> int:
        """How many of so many lie otherwise than in rows: none."""
        return 0

    def keep(self, length: int) -> None:
        """Takes the last tokens back, so that `length` have been seen. No memory moves.

        Raises:
            ValueError: they are not all held.
        """
        if not self.origin <= length <= self.length:
            raise ValueError(f"a store of tokens {self.origin} to {self.length} cannot go back to {length}")
        self.length = length

    def reorder(self, index_B: Tensor) -> None:
        """The sequences in another order, some of them several times: what a beam search does."""
        if self.keys_BHTD is not None and self.values_BHTD is not None:
            self.house(self.keys_BHTD.index_select(0, index_B), self.values_BHTD.index_select(0, index_B))

    @property
    def bytes(self) -> int:
        """Of the memory, its room included."""
        held = (self.keys_BHTD, self.values_BHTD)
        return sum(memory.numel() * memory.element_size() for memory in held if memory is not None)


class Sliding(Growing):
    """A store that lets go of what its window has left behind.

    Attributes:
        sliding_window: tokens that attention looks back, itself included.
        record_past: nothing is let go until the next `keep`, which settles how much of the text stays.
    """

    def __init__(self, sliding_window: int) -> None:
        self.sliding_window = sliding_window
        self.record_past = False
        self._settled = 0
        super().__init__()

    def record(self) -> None:
        """Until the next `keep` everything from here on can be taken back."""
        self.record_past, self._settled = True, self.length

    def _first(self, seen: int) -> int:
        """The first token that may still be read when `seen` have come."""
        return max(0, (min(self._settled, seen) if self.record_past else seen) - self.sliding_window + 1)

    def append(self, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Adds new tokens, and gives what the first of them looks back to, and theirs."""
        new, rows, visible = keys_BHTD.shape[-2], self.rows, min(self.length, self.sliding_window - 1)
        seen = (keys_BHTD, values_BHTD)
        if visible and self.keys_BHTD is not None and self.values_BHTD is not None:
            held = (memory[:, :, rows - visible : rows] for memory in (self.keys_BHTD, self.values_BHTD))
            seen = (torch.cat((next(held), keys_BHTD), 2), torch.cat((next(held), values_BHTD), 2))
        skipped = max(0, self._first(self.length + new) - self.length)
        if skipped:  # a long text fills the window by itself
            self.length += skipped
            self.origin, self.stamp = self.length, new_stamp()
        self.reserve(new - skipped, keys_BHTD, values_BHTD)
        self._write(keys_BHTD[:, :, skipped:], values_BHTD[:, :, skipped:])
        return seen

    def reserve(self, new: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Makes room for `new` more tokens, first by moving the window to the front of its memory."""
        if self.keys_BHTD is not None and self.values_BHTD is not None and self.rows + new > self.room:
            first = max(self._first(self.length), self.origin)
            gone, rows = first - self.origin, self.rows
            if gone:
                for memory in (self.keys_BHTD, self.values_BHTD):
                    memory[:, :, : rows - gone] = memory[:, :, gone:rows].clone()
                self.origin, self.stamp = first, new_stamp()
        super().reserve(new, keys, values)

    def roomy(self, held: Tensor, tokens: int) -> Tensor:
        """What is held in new memory with room for so many tokens and, behind a window, a quarter of it more."""
        return with_room(held, tokens, min(ROOM, max(LEAST, self.sliding_window // 4)))

    def keep(self, length: int) -> None:
        """Takes the last tokens back, and lets go of what the window has left behind.

        Raises:
            RuntimeError: what the window would then show is held no more.
        """
        if self.origin > max(0, length - self.sliding_window + 1):
            raise RuntimeError(
                f"the last {self.length - length} tokens cannot be taken back from a window of {self.sliding_window} "
                "that has moved on; call `activate_past_recording` before they come."
            )
        self.length = self._settled = length

    def reset(self) -> None:
        """Forgets everything."""
        self._settled = 0
        super().reset()


def _begins(memory: Tensor | None, tensor: Tensor) -> bool:
    """Whether `tensor` is the first tokens of `memory`, as after a crop."""
    return (
        memory is not None
        and tensor.data_ptr() == memory.data_ptr()
        and tensor.stride() == memory.stride()
        and tensor.shape[:2] == memory.shape[:2]
    )


def with_room(tensor: Tensor, tokens: int, room: int = ROOM) -> Tensor:
    """(B, H, T, D) in new memory for `tokens`, and for half of `room` more at least; a multiple of `room`."""
    batch, heads, held, size = tensor.shape
    room = -(-(tokens + room // 2) // room) * room
    with torch.inference_mode(False):  # memory that may be written outside of inference mode too
        memory = torch.empty(batch, heads, room, size, dtype=tensor.dtype, device=tensor.device)
    memory[:, :, :held] = tensor
    return memory
