"""What is asked of a search over members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from regauge.errors import BudgetError, SettingError
from regauge.search import budgets as written
from regauge.search.budgets import Budget
from regauge.search.evolution import Effort
from regauge.search.members.record import name_of
from regauge.text.corpora import Where

METHODS = ("", "gptq-w8", "gptq-w4g64", "gptq-w3g64")
"""Ways of storing weights that are tried, the largest first; "": as the source has them."""
TOKENS = 16384
FIRST = Effort(evaluations=16, first=8, rounds=2)
"""Of each budget, for each way of storing weights."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        methods: presets of weights; () is `METHODS`.
        drafts: what may draft for the whole, as of `fit`.
        first, further: how many members are measured for each budget with every way, and with the one that is taken.
    """

    budgets: Sequence[str]
    calibration: Where | None = None
    eval: Where | None = None
    methods: str | Sequence[str] = ()
    tokens: int | None = None
    length: int | None = None
    seed: int = 0
    revision: str | None = None
    force: bool = False
    drafts: str | None = None
    first: Effort = FIRST
    further: Effort = field(default_factory=Effort)

    @property
    def ways(self) -> tuple[str, ...]:
        """Presets of weights; "" and "none": as the source has them."""
        some = self.methods.split(",") if isinstance(self.methods, str) else self.methods
        return tuple("" if one.strip() == "none" else one.strip() for one in some) or METHODS


def asked(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Budgets as written, each of a member of its own.

    Raises:
        BudgetError: one is malformed, none is given, or two are the same.
    """
    budgets = tuple(written.parse_one(text) for text in texts)
    if not budgets:
        raise BudgetError("members are chosen for budgets: give one or several, such as --budget memory=0.5x")
    if len({name_of(budget) for budget in budgets}) < len(budgets):
        raise BudgetError("two budgets are the same: each member is for one of its own")
    for budget in budgets:
        if budget.context is not None:
            raise BudgetError(f"{budget.text!r}: members are chosen for their own memory: memory=0.5x or memory=2GB")
    return budgets


def refuse(given: Mapping[str, object]) -> None:
    """Options that a search over members does not take.

    Raises:
        SettingError: names those that were given.
    """
    wrong = [f"--{name}" for name, value in given.items() if value is not None]
    if wrong:
        raise SettingError(f"{', '.join(wrong)} and --members are not for one search; leave one of them out")
