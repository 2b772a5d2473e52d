"""The file system under an artifact: small files written atomically, and failures told in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from regauge.errors import OutputError

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
            f"{out} needs about {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
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
    """Makes the renames within a directory last."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
