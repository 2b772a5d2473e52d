"""The file system under an artifact: small files written atomically, and failures told in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from regauge.amounts import told
from regauge.errors import OutputError

UNLOCKABLE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system without locks says: two runs at once are then the user's to avoid."""
TEMPORARY = ".tmp-"
"""What the name of a file begins with until it is whole."""


@contextlib.contextmanager
def one_sentence(doing: str, path: Path) -> Iterator[None]:
    """Turns a failure of the file system into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else (error.strerror or str(error)).lower()
        todo = "free some space" if full else "check the path and its permissions"
        raise OutputError(
            f"{doing} {path} failed: {what}. What was finished is kept; {todo} and run the same command again."
        ) from error


def free_bytes(out: Path) -> int:
    """Bytes free where OUT will lie."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_disk(out: Path, needed: int) -> None:
    """Refuses before any work where `needed` bytes would not fit."""
    free = free_bytes(out)
    if free < needed:
        raise OutputError(
            f"{out} needs about {told(needed)} and its disk has {told(free)} free; "
            "free some space or choose another directory."
        )


def put(path: Path, content: bytes | str | Path) -> None:
    """Writes or copies one small file atomically."""
    data = content.read_bytes() if isinstance(content, Path) else content
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Makes the renames within a directory last; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_lock(path: Path) -> FileLock:
    """Holds a directory that one run at a time may write, by the system's lock on a file in it, which ends with the
    process that has it, however that ends.

    Raises:
        OutputError: another run has it.
    """
    lock = FileLock(path, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"another run is writing {path.parent}; wait for it to end or choose another directory."
        ) from error
    except OSError as error:
        if error.errno not in UNLOCKABLE:
            raise
    return lock
