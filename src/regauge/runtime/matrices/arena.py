"""Memory for the packed matrices of one model: a few large runs of pages, huge ones where the system has them.

A CPU reads weights from 2 MiB pages up to a third faster than from 4 KiB ones. Linux gives huge pages to private
anonymous memory that asks for them, and only to whole aligned 2 MiB of it, so matrices share chunks; what a chunk has
left is given back. A chunk lives as long as any tensor in it.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

CHUNK = 64 << 20
HUGE = 2 << 20
ALIGNED = 64
"""Bytes: of a chunk, of a huge page, and what every tensor is aligned to."""


class Arena:
    """Hands out memory from chunks. `trim` once no more will be asked for."""

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Begins a new chunk with the next request: the last one then lives as long as what lies in it."""
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def allocate(self, size: int) -> Tensor:
        """An empty uint8 tensor (size,), aligned to 64 bytes."""
        if self._used + size > len(self._bytes):
            self.trim()
            self._open(max(size, CHUNK))
        found = self._bytes[self._used : self._used + size]
        self._used += -(-size // ALIGNED) * ALIGNED
        # A storage of its own: a copy of the tensor is then a copy of it, and not of its chunk.
        offset = found.data_ptr() - self._start
        return torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=offset) if size else found

    def trim(self) -> None:
        """Gives back the pages of the last chunk that nothing lies in: a huge page is had whole or not at all."""
        if self._map is not None:
            first = self._bytes.data_ptr() - self._start + self._used
            begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            if begin < len(self._map):
                _advise(self._map, "MADV_DONTNEED", begin, len(self._map) - begin)

    def _open(self, size: int) -> None:
        private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)  # shared memory has no huge pages
        self._map = mmap.mmap(-1, size + HUGE, flags=private) if private else mmap.mmap(-1, size + HUGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        self._start = whole.data_ptr()
        lead = -self._start % HUGE
        self._bytes, self._used = whole[lead : lead + size], 0
        _advise(self._map, "MADV_HUGEPAGE", lead // mmap.PAGESIZE * mmap.PAGESIZE, size)


def _advise(memory: mmap.mmap, how: str, start: int, size: int) -> None:
    """A hint, where this system has it and takes it."""
    option = getattr(mmap, how, None)
    if option is not None:
        try:
            memory.madvise(option, start, size)
        except OSError:  # a kernel without huge pages refuses; the memory is as good
            return
