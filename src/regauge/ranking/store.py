"""Results that outlive a run: one SQLite file in the folder of a comparison, a row for each recipe, model and text.

A row is found again by its key: a hash over what decides the figures (model, recipe, texts, amounts, seed, version).
Each is committed as it is made, so that whatever ends a run, what was done stays. One run at a time writes a folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, create_engine, insert, select
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DatabaseError

from regauge.errors import OutputError
from regauge.ranking.record import Result, Windowed

NAME = "compare.sqlite"
FORMAT = 1
"""Of the tables; a store of another is refused."""

_TABLES = MetaData()
_META = Table("meta", _TABLES, Column("name", String, primary_key=True), Column("value", String, nullable=False))
_RESULTS = Table(
    "results",
    _TABLES,
    Column("key", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("text", String, nullable=False),
    Column("recipe", String, nullable=False),
    Column("record", String, nullable=False),  # a `Result` as JSON
    Column("kl", LargeBinary, nullable=False),  # float64 a window: nats
    Column("tokens", LargeBinary, nullable=False),  # int64 a window: tokens scored
    Column("unit", LargeBinary, nullable=False),  # int64 a window: which document, or window, it is drawn with
    Column("at", Float, nullable=False),
    Column("seed", Integer, nullable=False),
)


def key_of(parts: Mapping[str, object]) -> str:
    """sha256 over what decides a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Store:
    """The results of one folder."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path, self._engine = path, engine

    @staticmethod
    @contextmanager
    def open(folder: Path) -> Iterator[Store]:
        """The store in a folder, made where there is none; let go when the block ends.

        Raises:
            OutputError: it is no store, is one of another version, or cannot be written.
        """
        path = folder / NAME
        engine = create_engine(URL.create("sqlite", database=str(path)))
        try:
            with _told(path):
                _TABLES.create_all(engine)
                with engine.begin() as connection:
                    found = connection.execute(select(_META.c.value).where(_META.c.name == "format")).scalar()
                    if found is None:
                        connection.execute(insert(_META).values(name="format", value=str(FORMAT)))
            if found not in (None, str(FORMAT)):
                raise OutputError(
                    f"{path} holds results in format {found} and this version of regauge reads {FORMAT}; "
                    "give another folder."
                )
            yield Store(path, engine)
        finally:
            engine.dispose()

    def get(self, key: str) -> Result | None:
        """A result by its key."""
        with _told(self.path), self._engine.connect() as connection:
            row = connection.execute(select(_RESULTS).where(_RESULTS.c.key == key)).mappings().first()
        return None if row is None else _read(row)

    def put(self, key: str, result: Result, at: float) -> None:
        """Keeps a result, at once."""
        w = result.windows
        values = {
            "key": key,
            "model": result.model,
            "text": result.text,
            "recipe": result.recipe,
            "record": result.model_dump_json(exclude={"windows"}),
            "kl": w.kl_W.astype(np.float64).tobytes(),
            "tokens": w.tokens_W.astype(np.int64).tobytes(),
            "unit": w.unit_W.astype(np.int64).tobytes(),
            "at": at,
            "seed": result.seed,
        }
        with _told(self.path), self._engine.begin() as connection:
            connection.execute(insert(_RESULTS).values(**values))

    def all(self) -> tuple[Result, ...]:
        """Every result, oldest first."""
        with _told(self.path), self._engine.connect() as connection:
            rows = connection.execute(select(_RESULTS).order_by(_RESULTS.c.at)).mappings().all()
        return tuple(_read(row) for row in rows)


def _read(row: Any) -> Result:
    windows = Windowed(
        np.frombuffer(row["kl"], dtype=np.float64),
        np.frombuffer(row["tokens"], dtype=np.int64),
        np.frombuffer(row["unit"], dtype=np.int64),
    )
    return Result.model_validate({**json.loads(row["record"]), "windows": windows})


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the database says, in a sentence of ours."""
    try:
        yield
    except DatabaseError as error:
        said = str(error.orig).lower()
        if "full" in said:
            why = OSError(errno.ENOSPC, "the disk is full")
            raise OutputError(
                f"{path} cannot be written: the disk is full. What was finished is kept; free some space and run the "
                "same command again."
            ) from why
        raise OutputError(f"{path} cannot be used as a store of results: {said}; give another folder.") from error
