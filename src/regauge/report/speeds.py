"""How fast a token is behind each row of caches, beside bf16: what `benchmarks/cache.py --keep` wrote."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def kept() -> dict[str, Any]:
    """How it was measured, and row → tokens of context → bf16's time a token over the row's."""
    found: dict[str, Any] = json.loads((files("regauge") / "presets" / "speed.json").read_text(encoding="utf-8"))
    return found


def slower_below(times: dict[int, float]) -> int | None:
    """The shortest context that was measured from which on a token is no slower than with bf16; 0 where it never is
    slower, None where it is so at the longest.

    Args:
        times: tokens of context → bf16's time a token over the row's.
    """
    slow = max((context for context, ratio in times.items() if ratio < 1), default=None)
    if slow is None:
        return 0
    return min((context for context in times if context > slow), default=None)


def told(name: str) -> str:
    """`slower than bf16 below 4096 tokens; 1.8 times as fast at 16384`, of a row that was measured; else ""."""
    row: dict[str, float] = kept()["rows"].get(name, {})
    return sentence({int(context): ratio for context, ratio in row.items()})


def sentence(times: dict[int, float]) -> str:
    """What `told` says of such figures."""
    if not times:
        return ""
    least, longest = min(times), max(times)
    fast, limit = f"{times[longest]:.2g} times as fast as bf16 at {longest}", slower_below(times)
    if limit is None:
        return f"slower than bf16 at {longest} tokens, the longest measured ({times[longest]:.2g} times as fast)"
    if limit == 0:
        return f"no slower than bf16 from {least} tokens on, where measuring began; {fast}"
    return f"slower than bf16 below {limit} tokens; {fast}"
