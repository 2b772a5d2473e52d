"""What decides the bytes of an output, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping

Json = object
"""Anything that `json` writes: dict, list, str, int, float, bool, None."""


def differences(was: Mapping[str, Json], now: Mapping[str, Json], under: str = "") -> list[str]:
    """What differs between two identities, by dotted name: `plan (was 1a2b3c4d…, now 5e6f7a8b…)`."""
    found: list[str] = []
    for key in sorted(set(was) | set(now)):
        a, b = was.get(key), now.get(key)
        if type(a) is dict and type(b) is dict:
            found += differences(a, b, f"{under}{key}.")
        elif a != b:
            found.append(f"{under}{key} (was {_short(a)}, now {_short(b)})")
    return found


def _short(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
