"""The family tables: those in `families/`, and those that a user has put into a folder or named for one command.

A file holds one table or several, one after another. A table may say `like: TYPE` and then only what differs. A file
that says `part` describes wrappers: models around a part that another table describes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import platformdirs
import yaml
from pydantic import ValidationError

from regauge.errors import ModelError, UnknownArchitecture
from regauge.hosts.transformers.columns import Table, Wrapper, merged

FAMILIES = Path(__file__).parent / "families"
PAGE = "docs/families.md"
BESIDE = ("family.yaml", "regauge/family.yaml")
"""Where a table may lie in a model's directory; an artifact's lies in the last."""


@dataclass(frozen=True)
class Known:
    """What is known of model types.

    Attributes:
        raw: model type → the table as it was written, `like` resolved.
        files: model type → the file that says it.
        tables, wrappers: by model type.
    """

    raw: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)


_given: ContextVar[Path | None] = ContextVar("family", default=None)


@contextmanager
def family(path: str | Path | None) -> Iterator[None]:
    """While it lasts, in this thread, a file's tables are known too, before all others of their types.

    Raises:
        ModelError: there is no such file, or it holds no table.
    """
    if path is not None:
        read_family(Path(path))
    token = _given.set(None if path is None else Path(path))
    try:
        yield
    finally:
        _given.reset(token)


def user_folder() -> Path:
    """Where a user's own tables lie."""
    return platformdirs.user_config_path("regauge", appauthor=False) / "families"


def known(folder: str | Path | None = None) -> Known:
    """Every table: those given for a command before those in a model's directory, a user's own and regauge's.

    Args:
        folder: of a model or artifact, which may bring a table along.
    """
    own = tuple(sorted(user_folder().glob("*.yaml")))
    if folder:
        own += tuple(path for name in BESIDE if (path := Path(folder) / name).is_file())
    given = _given.get()
    own += () if given is None else (given,)
    return _with(tuple((path, path.stat().st_mtime_ns) for path in own)) if own else _shipped()


@lru_cache(maxsize=32)
def _with(files: tuple[tuple[Path, int], ...]) -> Known:
    """What is known with some files more, each as it was at a time."""
    return _read(_shipped(), [path for path, _ in files])


@cache
def _shipped() -> Known:
    return _read(Known(), sorted(FAMILIES.glob("*.yaml")))


def _read(base: Known, files: Sequence[Path]) -> Known:
    """What is known with some files more; a table may be like one of any of them.

    Raises:
        ModelError: a file cannot be read, or holds no table.
    """
    found = Known(dict(base.raw), dict(base.files), dict(base.tables), dict(base.wrappers))
    waiting = [(path, raw) for path in files for raw in _documents(path)]
    while waiting:
        ready = [(path, raw) for path, raw in waiting if raw.get("like") is None or raw["like"] in found.raw]
        if not ready:
            path, raw = waiting[0]
            raise ModelError(f"{path}: there is no table {raw['like']!r} to be like{_closest(str(raw['like']), found)}")
        waiting = [one for one in waiting if one not in ready]
        for path, raw in ready:
            _add(found, path, raw)
    return found


def read_family(path: Path) -> Known:
    """The tables of one file, with those that come with regauge.

    Raises:
        ModelError: it cannot be read, or holds no table.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}; --family takes a table as {PAGE} describes it")
    return _read(_shipped(), [path])


def beside(config: Any) -> dict[str, str]:
    """The file that an artifact must hold so that it can be loaded anywhere: the table of its family, where that is
    none of regauge's own."""
    found = known(_folder(config))
    wrapper = found.wrappers.get(config.model_type)
    kinds = [config.model_type] + ([] if wrapper is None else [str(getattr(config, wrapper.part).model_type)])
    own = [found.raw[kind] for kind in kinds if kind in found.files and found.files[kind].parent != FAMILIES]
    return {BESIDE[1]: yaml.safe_dump_all(own, sort_keys=False)} if own else {}


def _folder(config: Any) -> str:
    """The directory that a config was read from, where it is one."""
    return str(getattr(config, "_name_or_path", "") or "")


def _documents(path: Path) -> list[dict[str, Any]]:
    try:
        found = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{path} cannot be read as YAML: {str(error).splitlines()[0][:200]}") from error
    if not found or not all(isinstance(raw, dict) and isinstance(raw.get("types"), list) for raw in found):
        raise ModelError(f"{path} holds no family table (a mapping with `types`): see {PAGE}")
    return found


def _add(found: Known, path: Path, raw: dict[str, Any]) -> None:
    own = {key: value for key, value in raw.items() if key != "like"}
    whole = merged(found.raw[raw["like"]], own) if raw.get("like") is not None else own
    try:
        if "sites" in whole:
            found.tables.update(dict.fromkeys(whole["types"], Table.model_validate(whole)))
        else:
            found.wrappers.update(dict.fromkeys(whole["types"], Wrapper.model_validate(whole)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ModelError(f"{path} is no family table: {where}: {first['msg']}; see {PAGE}") from error
    for name in whole["types"]:
        found.raw[name], found.files[name] = whole, path


def tables() -> Mapping[str, Table]:
    """Every table by `model_type`."""
    return known().tables


def check_type(model_type: str, folder: str | Path | None = None) -> None:
    """Raises UnknownArchitecture, which names the closest table to copy, unless a table describes a model type."""
    found = known(folder)
    if model_type not in found.tables and model_type not in found.wrappers:
        raise UnknownArchitecture(
            f"no family table describes model_type {model_type!r}; to add one, copy {_example(model_type, found)}, "
            f"change what differs and give it with --family FILE: {PAGE} tells how"
        )


def table_for(config: Any) -> Table:
    """The table of a config's architecture; of a wrapper, that of its part, with where it stands.

    Raises:
        UnknownArchitecture: none describes it.
    """
    folder = _folder(config)
    check_type(config.model_type, folder)
    found = known(folder)
    wrapper = found.wrappers.get(config.model_type)
    if wrapper is None or config.model_type in found.tables:
        return found.tables[config.model_type]
    inner = getattr(config, wrapper.part, None)
    kind = str(getattr(inner, "model_type", ""))
    if kind not in found.tables:
        raise UnknownArchitecture(
            f"{config.model_type} holds a model of type {kind!r}, which no family table describes; to add one, copy "
            f"{_example(kind, found)}, change what differs and give it with --family FILE: {PAGE} tells how"
        )
    own = found.tables[kind]
    return own.model_copy(update={"body": wrapper.body, "part": wrapper.part, "step": wrapper.why, "sizes": own.sizes})


def _closest(word: str, found: Known) -> str:
    close = difflib.get_close_matches(word[:100], found.tables, n=1, cutoff=0.5)
    return f" (the nearest is {close[0]!r})" if close else ""


def _example(model_type: str, found: Known) -> str:
    """The file whose table is likely the nearest: of a type that shares the beginning of the name, else llama's."""
    stem = model_type.rstrip("0123456789_.-")
    near = difflib.get_close_matches(model_type[:100], found.tables, n=1, cutoff=0.75)
    begun = [name for name in found.tables if len(stem) > 3 and name.startswith(stem)]
    return found.files[(near + begun + ["llama"])[0]].name
