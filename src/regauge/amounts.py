"""Amounts as a user writes them: `2GB`, `500MiB`, `0.30x`, contexts: `4096`, `32k`, and several numbers: `4/3/2`.

GB is 10⁹ and GiB is 2³⁰; `k` of a context is 1024 tokens. `x` is left to the caller: it is a ratio to something.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeVar

from regauge.errors import BudgetError, nearest

UNITS = {
    "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip

_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
AMOUNT = re.compile(rf"(?P<sign>[-+]?)(?P<number>{_NUMBER})\s*(?P<unit>[A-Za-z/]*)")
_CONTEXT = re.compile(r"(?P<number>[0-9]+)(?P<unit>[kK]?)")
T = TypeVar("T")
MANY = 1e9
"""From here on a figure is told by its size alone."""


def amount(value: str, text: str) -> tuple[float, str]:
    """(number, unit) of `value`, which stands in `text`; the number is positive.

    Raises:
        BudgetError: it is no amount, negative or zero.
    """
    match = AMOUNT.fullmatch(value)
    if match is None:
        raise BudgetError(f"{value!r} in {text!r} is not an amount; write a number and a unit, such as 0.30x or 2GB.")
    number = float(match["number"])
    if match["sign"] == "-":
        raise BudgetError(f"{text!r} is negative; a budget is a positive amount.")
    if number == 0:
        raise BudgetError(f"{text!r} is zero; a budget is a positive amount.")
    return number, match["unit"]


def factor(unit: str, text: str) -> int:
    """Bytes of a unit of memory.

    Raises:
        BudgetError: there is none, or one that we do not know.
    """
    if unit not in UNITS:
        hint = nearest(unit, [*UNITS, "x"]) if unit else " (write a unit: 0.30x, 2GB, 500MiB)"
        raise BudgetError(f"{text!r} has no unit that we know{hint}.")
    return UNITS[unit]


def several(text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """What `read` makes of each number of `4/3/2`, without the spaces around it."""
    return tuple(read(one.strip()) for one in text.split("/"))


def whole(text: str) -> int:
    """A whole number from 0 to 999,999,999.

    Raises:
        ValueError: it is none.
    """
    if not text.isdecimal() or len(text) > 9:
        raise ValueError(f"{text[:40]!r} is no whole number")
    return int(text)


def memory(value: str, text: str) -> int:
    """Bytes of `6GB`, which stands in `text`.

    Raises:
        BudgetError: it is no amount of memory.
    """
    number, unit = amount(value.strip(), text)
    return int(number * factor(unit, text))


_LENGTHS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def length(value: str, text: str) -> float:
    """Seconds of `30m`, `1h30m` or `90`, which stands in `text`.

    Raises:
        BudgetError: it is no length of time, or none is left in it.
    """
    said = value.strip().lower()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", said):
        found = float(said)
    elif re.fullmatch(r"([0-9]+(\.[0-9]+)?[smhd])+", said):
        found = sum(float(n) * _LENGTHS[unit] for n, unit in re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", said))
    else:
        raise BudgetError(f"{text} is not a length of time: write 90s, 30m or 1h30m")
    if not 0 < found < math.inf:
        raise BudgetError(f"{text} leaves no time")
    return found


def context(value: str, text: str) -> int:
    """Tokens of `32k` or `4096`, which stands in `text`."""
    match = _CONTEXT.fullmatch(value)
    if match is None or int(match["number"]) == 0:
        raise BudgetError(f"{value!r} in {text!r} is not a context; write tokens, such as memory@32k=2GB.")
    return int(match["number"]) * (1024 if match["unit"] else 1)


def told(count: float) -> str:
    """Bytes as a person reads them, in powers of ten: `1.50 GB`, `640 kB`; three digits. The one place for it."""
    for unit in ("TB", "GB", "MB", "kB"):
        if count >= UNITS[unit]:
            number = count / UNITS[unit]
            return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"
    return f"{count:.0f} B"


def figure(value: float, places: int, sign: str = "") -> str:
    """A figure with so many places; one that is out of all proportion (a perplexity of e^300) by its size alone."""
    return f"{value:{sign}.{places}f}" if abs(value) < MANY else f"{value:{sign}.2g}"


def enough(count: float) -> str:
    """At least so many bytes, as they would be typed: `1.88GB`; three digits, rounded up."""
    for unit in ("TB", "GB", "MB", "kB"):
        size = UNITS[unit]
        if count >= size:
            places = 0 if count >= 100 * size else 1 if count >= 10 * size else 2
            return f"{math.ceil(count / size * 10**places) / 10**places:.{places}f}{unit}"
    return f"{math.ceil(count)}B"
