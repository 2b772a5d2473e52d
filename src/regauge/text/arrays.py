"""Arrays of an .npz that others wrote, read without trusting it: nothing is unpickled, and no memory is taken by what a
header says before that is held against the file. Of many rows those that are wanted stay, the others pass by.
"""

from __future__ import annotations

import math
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from regauge.errors import TextError

ENDING = ".npz"
MOST, PIECE = 1 << 33, 1 << 22
"""How its files end; bytes of an array at most, unpacked; and those that are read at a time."""


def named(given: object) -> TypeGuard[str | Path]:
    """Whether what a user gives is the name of such a file."""
    return isinstance(given, str | Path) and Path(given).suffix == ENDING


@dataclass(frozen=True)
class Header:
    """What an array says of itself, which is what its file holds."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


def header(path: Path, names: Sequence[str], wanted: str) -> Header:
    """What the first of some arrays that an .npz has says of itself; nothing else is read.

    Raises:
        TextError: as `array`.
    """
    with _opened(path, names, wanted) as (found, _):
        return found


def array(path: Path, names: Sequence[str], wanted: str, rows: Sequence[int] | None = None) -> NDArray[Any]:
    """The first of some arrays that an .npz has.

    Args:
        rows: only these, in rising order; None: all.
        wanted: what a file should hold, for the error.

    Raises:
        TextError: it is no such file, has none of them, or one that is damaged, too large, or of objects.
    """
    with _opened(path, names, wanted) as (said, file):
        if said.fortran or not said.shape:
            flat = np.frombuffer(file.read(), dtype=said.dtype)
            found = flat.reshape(said.shape, order="F" if said.fortran else "C")
            return found.copy() if rows is None else found[list(rows)]
        count, each = said.shape[0], said.shape[1:]
        keep = range(count) if rows is None else rows
        size = math.prod(each) * said.dtype.itemsize
        made = np.empty((len(keep), *each), dtype=said.dtype)
        if size and count:
            _fill(file, made, keep, size)
        return made


def _fill(file: zipfile.ZipExtFile, made: NDArray[Any], keep: Sequence[int], size: int) -> None:
    """Rows of so many bytes each, one after the other; a file is read to its end, where its checksum is told."""
    at = place = 0
    several = max(1, PIECE // size)
    while data := file.read(size * several):
        got = len(data) // size
        if len(data) % size:
            raise EOFError("it ends within a row")
        while place < len(keep) and keep[place] < at + got:
            start = (keep[place] - at) * size
            made[place] = np.frombuffer(data[start : start + size], dtype=made.dtype).reshape(made.shape[1:])
            place += 1
        at += got
    if place < len(keep):
        raise EOFError("it ends too early")


@contextmanager
def _opened(path: Path, names: Sequence[str], wanted: str) -> Iterator[tuple[Header, zipfile.ZipExtFile]]:
    broken = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no file")
        with zipfile.ZipFile(path) as folder:
            known = {info.filename.removesuffix(".npy"): info for info in folder.infolist()}
            name = next((one for one in names if one in known), "")
            if not name:
                raise ValueError(f"it has {', '.join(map(repr, sorted(known)[:4])) or 'no array'}")
            with cast(zipfile.ZipExtFile, folder.open(known[name])) as file:
                yield _header(file, known[name].file_size, name), file
    except broken as error:
        raise TextError(f"{path} holds no {wanted} is needed ({error}).") from error


def _header(file: zipfile.ZipExtFile, held: int, name: str) -> Header:
    """
    Raises:
        ValueError: the file holds more or less than it says, too much, or objects.
    """
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} is of version {version} of its format")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{name!r} is an array of objects, which are never unpickled")
    said, there = math.prod(map(int, shape)) * dtype.itemsize, held - file.tell()
    if min(shape, default=0) < 0 or said != there:
        raise ValueError(f"{name!r} says it is {shape} of {dtype}, {said:,} bytes, and {there:,} follow")
    if said > MOST:
        raise ValueError(f"{name!r} is {shape} of {dtype}, {said:,} bytes, and {MOST:,} are read at most")
    return Header(tuple(map(int, shape)), dtype, bool(fortran))
