"""The modules of a sentence-transformers directory: what its `modules.json` names, and the folders they lie in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from regauge.documents import inside, read_text
from regauge.errors import ModelError

MODULES = "modules.json"


@dataclass(frozen=True)
class Module:
    """One module, in the order in which they run.

    Attributes:
        path: its folder, "" for the directory itself, where the transformer lies.
        type: its class, as written.
    """

    path: str
    type: str

    @property
    def name(self) -> str:
        """Its class without the package, with its folder: `2_Dense (Dense)`."""
        return f"{self.path} ({self.type.rsplit('.', 1)[-1]})"


def modules(folder: Path) -> tuple[Module, ...]:
    """The modules of a directory; none where it is of no sentence encoder.

    Raises:
        ModelError: `modules.json` is no list of modules, or names a folder that is not inside the directory.
    """
    path = folder / MODULES
    if not path.is_file():
        return ()
    try:
        found = json.loads(read_text(path, ModelError))
        return tuple(_module(entry) for entry in _listed(found))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no list of a sentence encoder's modules: {error}") from error


def _listed(found: object) -> list[object]:
    if type(found) is not list:
        raise ValueError(f"it is a {type(found).__name__}")
    return found


def _module(entry: object) -> Module:
    """
    Raises:
        ValueError: says what is wrong with it.
    """
    if type(entry) is not dict or type(entry.get("path")) is not str or type(entry.get("type")) is not str:
        raise ValueError(f"{str(entry)[:60]!r} is no module with a path and a type")
    path = entry["path"]
    inner = PurePosixPath(path)
    if inner.is_absolute() or ".." in inner.parts or "\\" in path or "\0" in path or path.startswith("~"):
        raise ValueError(f"it names {path[:60]!r}, which is no folder of the model's")
    return Module("" if path in ("", ".") else inner.as_posix(), entry["type"])


def module_files(folder: Path) -> Iterator[Path]:
    """Every file in the folders of the modules beside the transformer.

    Raises:
        ModelError: a link leads out of the directory, or something there is no file.
    """
    for module in modules(folder):
        if module.path:
            way = [folder / part for part in PurePosixPath(module.path).parents if part.name]
            if not (folder / module.path).is_dir():
                continue  # a module without files (Normalize) may have no folder
            inside(folder, [*way, folder / module.path], ModelError)
            inside(folder, (folder / module.path).rglob("*"), ModelError)
            yield from sorted(path for path in (folder / module.path).rglob("*") if path.is_file())
