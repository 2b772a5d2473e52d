"""Reads blocks ahead, in a thread, into the slots of the window.

The thread knows nothing of the model, so that a model nobody holds any more is let go. It sleeps while every slot is
full, and ends after some seconds without work, after an error, and at `close`; the next `take` starts another one.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from regauge.runtime.window.disk import Block, Disk

IDLE = 2.0
"""Seconds after which a thread without work ends."""


class Memory:
    """Anonymous private memory on pages of its own, huge ones where the system likes.

    Attributes:
        bytes_: the same bytes as a tensor.
        view: and as a buffer to read into.
    """

    def __init__(self, size: int) -> None:
        held = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                held.madvise(mmap.MADV_HUGEPAGE)
        self.bytes_: Tensor = torch.frombuffer(held, dtype=torch.uint8)
        self.view = memoryview(held)


@dataclass(eq=False)
class _Load:
    """One block on its way into a slot, or there."""

    block: int
    slot: int
    done: bool = False
    dropped: bool = False


class Reader:
    """The window: a few slots, filled ahead in the order of the blocks, round and round.

    Args:
        disk: the files; closed with the reader.
        blocks: in the order in which they run.
        slots: the memory of each slot.

    Attributes:
        waited: seconds that `take` had to wait for the disk, in all.
    """

    def __init__(self, disk: Disk, blocks: Sequence[Block], slots: Sequence[Memory]) -> None:
        self.waited = 0.0
        self._disk = disk
        self._blocks = tuple(blocks)
        self._turn = {block.number: turn for turn, block in enumerate(self._blocks)}
        self._slots = tuple(slots)
        self._changed = threading.Condition()
        self._free = list(range(len(self._slots)))
        self._ahead: deque[_Load] = deque()
        self._next = 0
        self._lent: int | None = None
        self._error: Exception | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def take(self, number: int) -> int:
        """Waits until a block is there, and lends its slot until `give`. A block out of turn restarts the order there.

        Raises:
            ArtifactError: a file was cut off or cannot be read.
        """
        with self._changed:
            if self._closed:
                raise ValueError("the window is closed")
            self._skip_to(number)
            started = time.perf_counter()
            while not (self._ahead and self._ahead[0].done):
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                if self._thread is None:
                    self._start()
                self._changed.notify_all()
                self._changed.wait()
            self.waited += time.perf_counter() - started
            self._lent = self._ahead.popleft().slot
            return self._lent

    def give(self) -> None:
        """Gives the slot back, to be filled with the next block."""
        with self._changed:
            if self._lent is not None:
                self._free.append(self._lent)
                self._lent = None
                if self._thread is None and self._error is None and not self._closed:
                    self._start()
                self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread and closes the files. Safe to repeat."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._disk.close()

    def _skip_to(self, number: int) -> None:
        """Drops what was read ahead of another block."""
        while self._ahead and self._ahead[0].block != number:
            load = self._ahead.popleft()
            load.dropped = True
            if load.done:
                self._free.append(load.slot)
        if not self._ahead and self._next != self._turn[number]:
            self._next, self._error = self._turn[number], None

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="regauge-window", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                load = self._order()
                if load is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
            try:
                block = self._blocks[self._turn[load.block]]
                whole = self._disk.fill(block.extents, self._slots[load.slot].view, partial(self._away, load))
                error = None
            except Exception as found:  # anything at all must reach the thread that waits
                whole, error = False, found
            with self._changed:
                load.done = whole
                if load.dropped or not whole:
                    self._free.append(load.slot)
                if error is not None and not load.dropped:
                    self._error = error
                    self._ahead.remove(load)
                    self._next = self._turn[load.block]
                    self._thread = None
                self._changed.notify_all()
                if self._thread is None:
                    return

    def _away(self, load: _Load) -> bool:
        return load.dropped or self._closed

    def _order(self) -> _Load | None:
        """The next block to read, once there is a slot; None where the thread should end."""
        until = time.monotonic() + IDLE
        while not self._closed:
            if self._free:
                load = _Load(self._blocks[self._next].number, self._free.pop())
                self._next = (self._next + 1) % len(self._blocks)
                self._ahead.append(load)
                return load
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._changed.wait(left)
        return None
