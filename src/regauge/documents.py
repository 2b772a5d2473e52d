"""Small files that others wrote, read without trusting them: the one way from a path to text or JSON.

A folder may have come as an archive: what stands there under a good name may be a link to anywhere, a pipe that never
ends, eight gigabytes, or JSON that nests without end. Each is one sentence here, before anything is read.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from regauge.errors import RegaugeError

MOST = 100_000_000
"""Bytes of a file that is read whole."""
DEEP = 100  # mappings and lists in one another
WEIGHTS = ".safetensors"
WITHIN = ("regauge", "additional_chat_templates", "1_*", "2_*")
"""Folders below a model's that are read or carried over."""


def read_text(path: Path, error: type[RegaugeError]) -> str:
    """The text of an ordinary file in UTF-8.

    Raises:
        error: it is not there, no ordinary file, too long, or not text; says which.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is no file but {_what(found.st_mode)}; fetch or build it again.")
        if found.st_size > MOST:
            raise error(f"{path} is {found.st_size:,} bytes long, which no such file is; fetch or build it again.")
        return path.read_text(encoding="utf-8")
    except OSError as seen:
        raise error(f"{path} cannot be read: {seen.strerror or seen}.") from seen
    except UnicodeDecodeError as seen:
        raise error(f"{path} is not text in UTF-8 (byte {seen.start}).") from seen
    except ValueError as seen:  # a name that no file can have
        raise error(f"{str(path)!r} cannot be read: {seen}.") from seen


def read_json(path: Path, error: type[RegaugeError]) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        error: it cannot be read, is no JSON, no mapping, nests too deep, or holds half of a character.
    """
    text = read_text(path, error)
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as seen:
        raise error(f"{path} is not JSON: {seen}.") from seen
    if type(raw) is not dict:
        raise error(f"{path} is no mapping but a {type(raw).__name__}; fetch or build it again.")
    if _deeper(raw, DEEP):
        raise error(f"{path} nests more than {DEEP} deep, which no such file does; fetch or build it again.")
    if "\\u" in text and _halved(raw):
        raise error(f"{path} holds half of a character (a lone surrogate); fetch or build it again.")
    return raw


def ordinary(folder: Path, error: type[RegaugeError]) -> None:
    """Refuses a model's folder in which a file is no file, or a link that leads out of it.

    Links stay where they do no harm: within the folder, into the store of a hub's cache that the folder is of, from one
    file of weights to another, and to nowhere (whoever needs the file says so).

    Raises:
        error: names the first.
    """
    inside(folder, _entries(folder), error)


def inside(folder: Path, paths: Iterable[Path], error: type[RegaugeError]) -> None:
    """The same of some files and folders below a model's."""
    try:
        home = folder.resolve()
        stores = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
        for path in paths:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                _linked(path, stores, error)
            elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise error(f"{path} is no file but {_what(mode)}; remove it, or fetch the model again.")
    except OSError as seen:
        raise error(f"{seen.filename or folder} cannot be read: {seen.strerror or seen}.") from seen


def _entries(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.iterdir())
    for name in WITHIN:
        for inner in folder.glob(name):
            if inner.is_dir() and not inner.is_symlink():
                yield from sorted(inner.iterdir())


def _linked(path: Path, stores: tuple[Path, ...], error: type[RegaugeError]) -> None:
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        return
    except (OSError, RuntimeError) as seen:
        raise error(f"{path} is a link that leads to itself; fetch the model again.") from seen
    mode = real.stat().st_mode
    if any(real.is_relative_to(store) for store in stores) and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    if path.suffix == real.suffix == WEIGHTS and stat.S_ISREG(mode):
        return
    raise error(
        f"{path} is a link out of its folder, to {real}: files that came with a model are not read from elsewhere; "
        "copy it there where you trust it."
    )


def _what(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _deeper(raw: object, most: int) -> bool:
    """Whether lists and mappings lie more than so many deep in one another. Without recursion."""
    level: list[object] = [raw]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)  # type: ignore[attr-defined]  # a list
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True


def _halved(raw: object) -> bool:
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
