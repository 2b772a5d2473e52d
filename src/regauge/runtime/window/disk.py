"""Blocks on disk: where their bytes lie, a reader of them, and a scratch file for blocks that had to be converted.

Reads are plain `preadv` in pieces, through the page cache for the kernel's read-ahead (half the rate without it on the
machine it was tried on), and each piece is dropped from the cache at once: otherwise the cache would hold the model
that memory was too small for, and would be counted against the process in a container.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from regauge import amounts
from regauge.errors import ArtifactError, OutputError

PIECE = 8 << 20  # bytes read at a time
ALIGN = 64  # bytes: a cache line, and the widest vector
PAGE = 4096


@dataclass(frozen=True)
class Extent:
    """A run of bytes: `size` of them at `at` in a file, which belong at `to` in the block."""

    file: str
    at: int
    size: int
    to: int


@dataclass(frozen=True)
class Entry:
    """One tensor of a block.

    Attributes:
        module: path of its module from the block.
        name: of the parameter or buffer.
        parameter: which of the two.
        to: where its bytes begin in the block.
    """

    module: str
    name: str
    parameter: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    to: int

    def view(self, block: Tensor) -> Tensor:
        """The tensor in the bytes of its block."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return block[self.to : self.to + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Block:
    """A transformer block: `size` bytes in memory, and where they are on disk."""

    number: int
    size: int
    entries: tuple[Entry, ...]
    extents: tuple[Extent, ...]


def aligned(size: int, to: int = ALIGN) -> int:
    """The next multiple."""
    return -(-size // to) * to


class Disk:
    """Open files by name. Files stay open, so that one that is removed can still be read.

    Attributes:
        read: bytes read so far.
    """

    def __init__(self) -> None:
        self.read = 0
        self._files: dict[str, int] = {}

    def open(self, path: Path) -> str:
        """Opens a file for reading, once; its name."""
        name = str(path)
        if name not in self._files:
            try:
                self.add(name, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from error
        return name

    def add(self, name: str, handle: int) -> None:
        """Takes over an open file."""
        self._files[name] = handle

    def fill(self, extents: Sequence[Extent], into: memoryview, stop: Callable[[], bool] = lambda: False) -> bool:
        """Reads a block; False where `stop` said so on the way.

        Raises:
            ArtifactError: a file ends too early or cannot be read.
        """
        for extent in extents:
            done = 0
            while done < extent.size:
                if stop():
                    return False
                count = min(PIECE, extent.size - done)
                piece = into[extent.to + done : extent.to + done + count]
                done += self._piece(extent.file, extent.at + done, piece)
        return True

    def _piece(self, name: str, at: int, into: memoryview) -> int:
        handle = self._files[name]
        try:
            got = os.preadv(handle, [into], at)
        except OSError as error:
            raise ArtifactError(f"{name} cannot be read any more ({error.strerror}); load the model again.") from error
        if not got:
            raise ArtifactError(f"{name} was cut off while the model ran; fetch or build it again, and load it again.")
        drop(handle, at, got)
        self.read += got
        return got

    def close(self) -> None:
        """Closes every file. Safe to repeat."""
        while self._files:
            os.close(self._files.popitem()[1])


def drop(handle: int, at: int = 0, size: int = 0) -> None:
    """Lets a run of a file go from the page cache (0 bytes: to its end), where the system can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, at, size, os.POSIX_FADV_DONTNEED)


def drop_all(path: Path) -> None:
    """Lets a file go from the page cache."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        drop(handle)
    finally:
        os.close(handle)


class Spool:
    """A scratch file without a name, so that nothing is left behind however the process ends.

    Args:
        near: directory to put it in; where that is not writable, the system's for temporary files.

    Attributes:
        name: for messages.
    """

    def __init__(self, near: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=near, buffering=0)  # noqa: SIM115  # its handle goes to a Disk
            self.folder = near
        except OSError:
            self.folder = Path(tempfile.gettempdir())
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  # the same
        self.name = f"the scratch file in {self.folder}"
        self._end = 0

    def check(self, needed: int) -> None:
        """Refuses before anything is written where `needed` bytes would not fit, or would be memory after all."""
        place = max(
            (p for p in psutil.disk_partitions(all=True) if self.folder.resolve().is_relative_to(p.mountpoint)),
            key=lambda p: len(p.mountpoint),
            default=None,
        )
        if place is not None and place.fstype in ("tmpfs", "ramfs"):
            raise OutputError(
                f"{self.folder} is kept in memory ({place.fstype}), which a window would not save; set TMPDIR to a "
                "directory on a disk."
            )
        stat = os.statvfs(self.folder)
        if stat.f_bavail * stat.f_frsize < needed:
            raise OutputError(
                f"the window needs {amounts.told(needed)} of scratch space in {self.folder}, which has "
                f"{amounts.told(stat.f_bavail * stat.f_frsize)}; free some, or set TMPDIR to another disk."
            )

    def append(self, tensors: Mapping[int, Tensor], size: int) -> Extent:
        """Writes a block of `size` bytes, given its tensors by the place where each begins."""
        start = self._end
        handle = self._file.fileno()
        try:
            for to, tensor in tensors.items():
                data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
                done = 0
                while done < len(data):
                    done += os.pwrite(handle, data[done : done + PIECE], start + to + done)
            os.ftruncate(handle, max(start + size, os.fstat(handle).st_size))
            getattr(os, "fdatasync", os.fsync)(handle)  # macOS has no fdatasync
        except OSError as error:
            raise OutputError(f"writing {self.name} failed: {error.strerror}; free some space.") from error
        drop(handle, start, size)
        self._end = aligned(start + size, PAGE)
        return Extent(self.name, start, size, 0)

    def give(self, disk: Disk) -> None:
        """Hands the file over for reading."""
        disk.add(self.name, os.dup(self._file.fileno()))
        self._file.close()

    def close(self) -> None:
        """Lets the file go, which frees its space. Safe to repeat."""
        self._file.close()
