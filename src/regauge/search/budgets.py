"""What may be spent, as the user writes it: `memory=0.30x`, `memory=2GB`, `memory@32k=3GiB`, `decode=1.5x`.

Memory is an upper bound in bytes: `x` counts against the source with every parameter as bf16, whatever dtype it is
stored in; GB is 10⁹ and GiB is 2³⁰. `memory@CONTEXT` counts the cache at that many
tokens too, which is chosen then, block by block, as the weights are. Decode and prefill are
lower bounds on speed: `x` counts against the source in bf16 by the same runtime on this machine, so that it is
compression that must give it. A floor bounds what may be lost: `kl=0.05` nats a token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from regauge import amounts
from regauge.errors import BudgetError, nearest

RESOURCES = ("memory", "decode", "prefill")
FLOORS = ("kl",)

_FLOAT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_BUDGET = re.compile(r"(?P<name>[^=@\s]*)(?:@(?P<context>[^=\s]*))?\s*=\s*(?P<value>.*)")


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

    def beside(self, cache: float, bytes_bf16: int) -> float:
        """What a memory budget leaves for the weights beside so many bytes of cache.

        Raises:
            BudgetError: nothing.
        """
        limit = self.bytes(bytes_bf16)
        if cache and cache >= limit:
            raise BudgetError(
                f"{self.text!r} allows {limit:,} bytes; the cache alone takes {cache:,.0f} at {self.context:,} tokens; "
                "ask for a shorter context or more."
            )
        return limit - cache


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
    number, unit = amounts.amount(value, text)
    relative = unit == "x"
    if name != "memory" and not relative:
        raise BudgetError(f"{text!r}: a speed is a ratio to the source in bf16 by the same runtime; write {name}=1.5x.")
    if name == "memory" and not relative:
        number *= amounts.factor(unit, text)
    return Budget(
        resource=name,
        amount=number,
        relative=relative,
        context=None if context is None else amounts.context(context, text),
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
    if not equals or _FLOAT.fullmatch(value.strip()) is None:
        raise BudgetError(f"{text!r} is not a floor; write kl=0.05 (nats a token).")
    return name.strip(), float(value)
