"""What may be spent, as the user writes it: `memory=0.30x`, `memory=2GB`, `memory@32k=3GiB`, `decode=1.5x`.

Memory is an upper bound in bytes: `x` counts against the source with every parameter as bf16, whatever dtype it is
stored in; GB is 10⁹ and GiB is 2³⁰. `memory@CONTEXT` adds the cache at that many tokens. Decode and prefill are
lower bounds on speed: `x` counts against the source in bf16 on this machine. A floor bounds what may be lost:
`kl=0.05` nats a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from regauge.errors import BudgetError, nearest

UNITS = {
    "B": 1,
    "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
RESOURCES = ("memory", "decode", "prefill")
FLOORS = ("kl",)

_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_BUDGET = re.compile(r"(?P<name>[^=@\s]*)(?:@(?P<context>[^=\s]*))?\s*=\s*(?P<value>.*)")
_AMOUNT = re.compile(rf"(?P<sign>[-+]?)(?P<number>{_NUMBER})\s*(?P<unit>[A-Za-z/]*)")
_CONTEXT = re.compile(r"(?P<number>[0-9]+)(?P<unit>[kK]?)")


class Budget(BaseModel):
    """One bound. `amount` is a ratio to the source where `relative`, else bytes (memory)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resource: str
    amount: float
    relative: bool
    context: int | None = None  # tokens whose cache counts, memory only
    text: str = ""

    @property
    def key(self) -> str:
        return self.resource if self.context is None else f"{self.resource}@{self.context}"

    def bytes(self, bytes_bf16: int) -> int:
        """The bound of a memory budget in bytes."""
        return math.floor(self.amount * bytes_bf16) if self.relative else math.floor(self.amount)


def parse(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Budgets as written on the command line; two of the same name contradict each other."""
    budgets = tuple(parse_one(text) for text in texts)
    seen: dict[str, Budget] = {}
    for budget in budgets:
        if budget.key in seen:
            raise BudgetError(
                f"{budget.resource!r} is given twice: {seen[budget.key].text!r} and {budget.text!r}; give it once."
            )
        seen[budget.key] = budget
    return budgets


def parse_one(text: str) -> Budget:
    """`memory=0.30x` → Budget."""
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise BudgetError(f"{text!r} is not a budget; write NAME=AMOUNT, such as memory=0.30x or decode=1.5x.")
    name, context, value = match["name"], match["context"], match["value"].strip()
    if name not in RESOURCES:
        raise BudgetError(f"{name!r} in {text!r} is not a budget{nearest(name, RESOURCES)}.")
    if context is not None and name != "memory":
        raise BudgetError(f"{text!r}: only memory takes a context; write {name}={value}.")
    amount, unit = _amount(value, text)
    relative = unit == "x"
    if name != "memory" and not relative:
        raise BudgetError(f"{text!r}: a speed is a ratio to the source in bf16; write {name}=1.5x.")
    if name == "memory" and not relative:
        if unit not in UNITS:
            hint = nearest(unit, [*UNITS, "x"]) if unit else " (write a unit: 0.30x, 2GB, 500MiB)"
            raise BudgetError(f"{text!r} has no unit that we know{hint}.")
        amount *= UNITS[unit]
    return Budget(
        resource=name,
        amount=amount,
        relative=relative,
        context=None if context is None else _context(context, text),
        text=text,
    )


def parse_floor(floor: str | Mapping[str, float] | None) -> dict[str, float]:
    """`kl=0.05` → {"kl": 0.05}; None → {}."""
    if floor is None:
        return {}
    pairs = dict([_floor_pair(floor)]) if isinstance(floor, str) else dict(floor)
    for name, amount in pairs.items():
        if name not in FLOORS:
            raise BudgetError(f"{name!r} is not a floor{nearest(name, FLOORS)}.")
        if not (amount > 0 and math.isfinite(amount)):
            raise BudgetError(f"the floor {name}={amount:g} leaves nothing to find; give a positive number.")
    return pairs


def _floor_pair(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    match = _AMOUNT.fullmatch(value.strip())
    if not equals or match is None or match["unit"]:
        raise BudgetError(f"{text!r} is not a floor; write kl=0.05 (nats a token).")
    return name.strip(), float(match["sign"] + match["number"])


def _amount(value: str, text: str) -> tuple[float, str]:
    match = _AMOUNT.fullmatch(value)
    if match is None:
        raise BudgetError(f"{value!r} in {text!r} is not an amount; write a number and a unit, such as 0.30x or 2GB.")
    number = float(match["number"])
    if match["sign"] == "-":
        raise BudgetError(f"{text!r} is negative; a budget is a positive amount.")
    if number == 0:
        raise BudgetError(f"{text!r} is zero; a budget is a positive amount.")
    return number, match["unit"]


def _context(context: str, text: str) -> int:
    match = _CONTEXT.fullmatch(context)
    if match is None or int(match["number"]) == 0:
        raise BudgetError(f"{context!r} in {text!r} is not a context; write tokens, such as memory@32k=2GB.")
    return int(match["number"]) * (1024 if match["unit"] else 1)
