"""Finding a part by its name."""

from __future__ import annotations

from regauge.errors import RecipeError, nearest
from regauge.parts.part import Part
from regauge.parts.points import FORMAT, tables
from regauge.parts.table import TABLE


def part(table: str, name: str, place: str = "") -> Part:
    """The line of the table, or the named part of another package.

    Raises:
        RecipeError: there is no such table or part, or it has no business at `place`.
    """
    if table not in TABLE and table not in tables():
        raise RecipeError(f"there is no axis {table!r}{nearest(table, TABLE)}")
    if foreign(name):
        return Part(name, f"a part of another package: {name}")
    known = {key: found for key, found in TABLE.get(table, {}).items() if not place or place in found.places}
    if not known:
        raise RecipeError(f"no part acts on {f'{place} ' if place else ''}{table} yet, so {name!r} cannot be had")
    if name not in known:
        elsewhere = TABLE[table].get(name)
        if elsewhere is not None:
            raise RecipeError(
                f"{table} {name!r} is for {' and '.join(elsewhere.places)}, not for {place}{nearest(name, known)}"
            )
        raise RecipeError(f"there is no {table} {name!r}{nearest(name, known)}")
    return known[name]


def empty(table: str, place: str) -> bool:
    """Whether no part acts on an axis of a place yet, so that its names cannot be told right from wrong."""
    return table != FORMAT and not any(place in found.places for found in TABLE.get(table, {}).values())


def foreign(name: str) -> bool:
    """Whether the name is `package.module:Name` of another package."""
    return "." in name.partition(":")[0] and ":" in name
