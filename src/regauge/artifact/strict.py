"""Reading JSON that others wrote: every key and type is checked before it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from regauge.errors import ArtifactError, nearest

T = TypeVar("T")
WORDS = {dict: "a mapping", list: "a list", str: "text", int: "a whole number", bool: "true or false"}


def typed(value: object, kind: type[T], where: str) -> T:
    """The value, where it is of just that type.

    Raises:
        ArtifactError: it is not.
    """
    if type(value) is not kind:
        raise ArtifactError(
            f"the header in config.json cannot be read: {where} must be {WORDS.get(kind, kind.__name__)}, and it is "
            f"{_short(value)}."
        )
    return value


def known(raw: Mapping[str, object], keys: Iterable[str], where: str) -> None:
    """Raises an ArtifactError where a mapping has a key that is none of these."""
    keys = tuple(keys)
    for key in raw:
        if key not in keys:
            hint = nearest(str(key), keys)
            raise ArtifactError(
                f"the header in config.json cannot be read: unknown key {_short(key)} in {where}{hint}."
            )


def mapped(raw: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The mapping under a key; empty where the key is absent."""
    found: dict[str, Any] = typed(raw.get(key, {}), dict, f"{key} of {where}")
    return found


def listed(raw: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """The list of mappings under a key, which must be there."""
    return [
        typed(item, dict, f"an entry of {key} of {where}") for item in typed(raw.get(key), list, f"{key} of {where}")
    ]


def named(raw: Mapping[str, Any], key: str, where: str) -> list[str]:
    """The list of names under a key, which must be there."""
    return [
        typed(item, str, f"an entry of {key} of {where}") for item in typed(raw.get(key), list, f"{key} of {where}")
    ]


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
