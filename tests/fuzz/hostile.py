"""Hostile content for every file of a folder: values for each field of a mapping, and whole files.

An attack is a name and a change of one file in a copy of a folder. Fields are walked as the files have them, so a new
field of a header is attacked the moment it is written; places in lists that are alike stand for one another.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.watched import TRAP

SECRET = "secret"
"""A folder beside the one attacked, that nothing may look into."""
DEEP = 100_000
TABLE = 30
"""Keys of a mapping above which they are rows that are alike; no record of ours has so many."""
VALUES: dict[str, Any] = {
    # code
    "a function": "os:system",
    "a trap": f"{TRAP}:fire",
    "a trapped module": f"{TRAP}.fire",
    "a class of Python's": "subprocess.Popen",
    "a part": {"part": f"{TRAP}:fire", "argument": 1},
    "a tag": f"!!python/object/apply:{TRAP}.fire []",
    "a template": "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(999999999) %}{% endfor %}",
    # paths
    "a path out": "../secret/x.safetensors",
    "a folder out": "../secret",
    "an absolute path": "/etc/passwd",
    "a url": "https://127.0.0.1:9/x.safetensors",
    "a file url": "file:///etc/passwd",
    "a home": "~/x",
    "dots": "..",
    "a null byte": "a\0b",
    # numbers
    "minus one": -1,
    "zero": 0,
    "a huge number": 10**9,
    "beyond 64 bits": 10**30,
    "a huge float": 1e308,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a half": 0.5,
    "true": True,
    # shapes
    "nothing": None,
    "empty text": "",
    "an empty list": [],
    "an empty mapping": {},
    "a list of nothing": [None],
    "a strange key": {"": {}, "\0": [], "a" * 300: 1},
    "nested": [[[[[[[[[[]]]]]]]]]],
    "many": list(range(5000)),
    # text
    "a pattern": "re:(([a-z._0-9]+)*)+X$",
    "a long pattern": "re:" + "a?" * 60 + "a" * 60,
    "long text": "x" * 300_000,
    "half a character": "\ud800",
    "lines": "one\ntwo\x1b[2J\r\x07",
    "a wildcard": "*" * 60 + "x",
    "braces": "{a,b}" * 18,
}
FEW = {
    "a part", "a path out", "a null byte", "minus one", "beyond 64 bits", "NaN", "nothing", "an empty list",
    "a strange key", "long text", "half a character",
}  # fmt: skip
"""What is tried on records, all of whose fields one library checks alike, and on tokenizers, which are another's."""
CHECKED = ("receipt.json", "run.json", "run-log.json", "tokenizer")
LIKE = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=layers\.)\d+|(?<=h\.)\d+")


@dataclass(frozen=True)
class Attack:
    """One hostile change. `file` is the path within the folder."""

    name: str
    file: str
    change: Callable[[Path], None]


def fields(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value of a document, itself first; of a long table (a vocabulary, a header) a few rows."""
    yield path
    if type(value) is dict:
        keys = list(value) if len(value) <= TABLE else [*list(value)[:2], *list(value)[-2:]]
        for key in keys:
            yield from fields(value[key], (*path, key))
    elif type(value) is list:
        for index, inner in enumerate(value):
            yield from fields(inner, (*path, index))


def kinds(document: Any) -> list[tuple[str | int, ...]]:
    """The fields of a document, one of each kind: places of lists and numbers in names stand for one another."""
    found: dict[str, tuple[str | int, ...]] = {}
    for path in fields(document):
        alike = "/".join("*" if type(word) is int else LIKE.sub("*", str(word)) for word in path)
        found.setdefault(alike, path)
    return [path for path in found.values() if path]


def put(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """The document with another value in one place."""
    made = copy.deepcopy(document)
    inner = made
    for word in path[:-1]:
        inner = inner[word]
    inner[path[-1]] = value
    return made


def renamed(document: Any, path: tuple[str | int, ...], name: str) -> Any:
    """The document with another name for one of its keys."""
    made = copy.deepcopy(document)
    inner = made
    for word in path[:-1]:
        inner = inner[word]
    inner[name] = inner.pop(path[-1])
    return made


def _write(text: str | bytes | Callable[[], str]) -> Callable[[Path], None]:
    """What writes a text, which may be made when it is asked for: there are thousands."""

    def change(path: Path) -> None:
        found = text() if callable(text) else text
        data = found.encode("utf-8", "surrogatepass") if isinstance(found, str) else found
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # copies share their files
        path.write_bytes(data)

    return change


def _link(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        os.symlink(target, path)

    return change


def _instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def _huge(path: Path) -> None:
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 33)


def whole(file: str, content: bytes) -> Iterator[Attack]:
    """What can be wrong with any file as a whole. `../` more than once for files in folders below."""
    up = "../" * (file.count("/") + 1)
    named: dict[str, Callable[[Path], None]] = {
        "is empty": _write(""),
        "is null": _write("null"),
        "is a list": _write("[]"),
        "is a mapping": _write("{}"),
        "is a number": _write("7"),
        "is text": _write('"text"'),
        "is cut": _write(content[: len(content) // 2]),
        "is binary": _write(bytes(range(256)) * 20),
        "is UTF-16": _write(content[:2000].decode("utf-8", "replace").encode("utf-16")),
        "nests without end": _write("[" * DEEP),
        "nests as mappings": _write('{"a":' * DEEP),
        "is a long number": _write("9" * 100_000),
        "is all braces": _write("{" * 2_000_000),
        "is of 8 GB": _huge,
        "is a link out": _link(f"{up}{SECRET}/kept.json"),
        "is a link to a device": _link("/dev/zero"),
        "is a link to itself": _link(Path(file).name),
        "is a link to nowhere": _link("nowhere"),
        "is a link to a folder": _link(".."),
        "is a folder": _instead(Path.mkdir),
        "is a pipe": _instead(lambda path: os.mkfifo(path)),
        "is missing": Path.unlink,
    }
    for what, change in named.items():
        yield Attack(f"{file} {what}", file, change)


def attacks(folder: Path) -> Iterator[Attack]:
    """Everything that is tried on the files of a folder."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        file, content = path.relative_to(folder).as_posix(), path.read_bytes()
        yield from whole(file, content)
        if path.suffix == ".json":
            yield from of_json(file, json.loads(content))
        elif path.suffix == ".safetensors":
            yield from of_header(file, content)
        elif path.suffix in (".yaml", ".yml"):
            yield from of_yaml(file, content.decode())


def of_json(file: str, document: Any, paths: Iterable[tuple[str | int, ...]] | None = None) -> Iterator[Attack]:
    for path in kinds(document) if paths is None else paths:
        told = f"{file}: {'.'.join(map(str, path))[:80]}"
        for what, value in VALUES.items():
            if what not in FEW and any(word in file for word in CHECKED):
                continue
            yield Attack(
                f"{told} is {what}", file, _write(lambda path=path, value=value: json.dumps(put(document, path, value)))
            )
        yield Attack(f"{told} is deep", file, _write(lambda path=path: _deep(put(document, path, "DEEP"))))
        if type(path[-1]) is str:
            for what in ("a trap", "a path out", "half a character", "long text"):
                yield Attack(
                    f"the key {told} is {what}",
                    file,
                    _write(lambda path=path, what=what: json.dumps(renamed(document, path, VALUES[what]))),
                )
            yield Attack(f"{told} is gone", file, _write(lambda path=path: json.dumps(gone(document, path))))


def gone(document: Any, path: tuple[str | int, ...]) -> Any:
    made = copy.deepcopy(document)
    inner = made
    for word in path[:-1]:
        inner = inner[word]
    del inner[path[-1]]
    return made


def _deep(document: Any) -> str:
    return json.dumps(document).replace('"DEEP"', "[" * 900 + "]" * 900)


def of_header(file: str, content: bytes) -> Iterator[Attack]:
    """The fields of a safetensors header."""
    length = int.from_bytes(content[:8], "little")
    document, tail = json.loads(content[8 : 8 + length]), content[8 + length :]
    some = {name: document[name] for name in (*list(document)[:2], list(document)[-1])}  # one is like another
    for attack in of_json(file, document, kinds(some)):
        yield Attack(f"the header of {attack.name}", file, _headed(attack.change, tail))


def _headed(change: Callable[[Path], None], tail: bytes) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        change(path)
        head = path.read_bytes()
        path.write_bytes(len(head).to_bytes(8, "little") + head + tail)

    return changed


ALIASES = "x0: &x0 [a,a,a,a,a,a,a,a,a]\n" + "".join(
    f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
SCALARS = {
    "is an impossible date": "2001-99-99",
    "is an impossible time": "2001-01-01 99:99:99",
    "is a sexagesimal": "1" + ":59" * 4000,
    "is a long integer": "9" * 20_000,
    "is a long hexadecimal": "0x" + "f" * 20_000,
    "is bytes": "!!binary '='",
    "is no integer": "!!int a",
    "is no float": "!!float a",
    "is no truth": "!!bool a",
    "is no date": "!!timestamp a",
    "is a set": "!!set {a, b}",
    "is pairs": "!!omap [a: 1, b]",
    "is an object": f"!!python/object/apply:{TRAP}.fire []",
    "is a name": f"!!python/name:{TRAP}.fire",
    "is a module": f"!!python/module:{TRAP}",
    "is a loop": "&a [*a]",
    "is a merge": "{<<: {grid: int4}, grain: channel}",
    "is deep": "[" * 2000 + "]" * 2000,
    "is a path out": "../secret/kept.json",
    "is an end of file": "\0",
    "is .inf": ".inf",
    "is .nan": ".nan",
    "is ~": "~",
    "is a huge number": "1" + "0" * 30,
    "is minus one": "-1",
    "is a trap": f"'{TRAP}:fire'",
    "is a part": f"{{part: '{TRAP}:fire'}}",
    "is wild": "'" + "*" * 60 + "x'",
    "is braces": "'" + "{a,b}" * 18 + "'",
    "is a pattern": "'blocks.*.[" + "z-a" * 3 + "]'",
    "is long": "x" * 300_000,
}


def of_yaml(file: str, text: str) -> Iterator[Attack]:
    """Every value and every name of a recipe."""
    yield Attack(f"{file}: aliases", file, _write(ALIASES + text))
    tokens = list(re.finditer(r"(?<=[:{,\[] )[^\s:{},\[\]|]+|^[ ]*('[^']*'|\"[^\"]*\"|[\w.*-]+)(?=:)", text, re.M))
    for token in tokens:
        for what, value in SCALARS.items():
            told = f"{file}: {token[0].strip()!r} at {token.start()} {what}"
            yield Attack(told, file, _write(lambda t=token, v=value: text[: t.start()] + v + text[t.end() :]))
