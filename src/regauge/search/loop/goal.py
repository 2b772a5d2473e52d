"""What was built, held against what was asked: a goal, what misses it, and the goal moved by what was missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from regauge.engine.drafting import Drafting, refused
from regauge.measure.cost import COMPRESSED, RUNTIME, Speeds
from regauge.search.allocation import Bound
from regauge.search.budgets import Budget
from regauge.search.drafting import DECODE, found
from regauge.search.loop.build import Built
from regauge.search.loop.desk import Desk

MEMORY = "memory"


@dataclass(frozen=True)
class Held:
    """One budget with the row that the allocation sees.

    Attributes:
        cache: bytes of the cache that count against it at its context, whatever is chosen.
        least: below which its row cannot be had, and drafts must give the rest.
    """

    budget: Budget
    bound: Bound
    cache: float = 0.0
    least: float = 0.0


@dataclass(frozen=True)
class Goal:
    """What the next allocation aims at: the budgets' rows and the floors, moved by what was missed so far."""

    held: tuple[Held, ...]
    floors: Mapping[str, float]

    def bounds(self, fixed: float) -> list[Bound]:
        """The rows, with what is spent in bytes whatever is chosen."""
        return [replace(one.bound, fixed=fixed) if one.budget.resource == MEMORY else one.bound for one in self.held]


def reached(spent: Speeds, resource: str) -> float:
    """How many times the speed of the uncompressed source by the same runtime."""
    return spent[resource][COMPRESSED].median / spent[resource][RUNTIME].median


def weights(spent: Speeds | None) -> float | None:
    """How fast an artifact decodes by its weights alone, where that was measured."""
    return None if spent is None else reached(spent, DECODE)


def drafts_of(desk: Desk, built: Built, missed: str) -> Drafting | None:
    """What drafts give on what was built; None where none are wanted, or where they would not help."""
    ask = desk.ask
    if not ask.drafts or any(not one.startswith(DECODE) for one in missed.split("; ") if one):
        return None
    if not ask.text:
        return refused("no text was given that would tell how often guesses are right")
    if not desk.watch.can("drafts", desk.watch.expected.get("drafts", 0.0)):
        return refused("there was no time to tell what they are worth")
    with desk.watch.step("drafts"):
        return found(desk.subject.source, built.folder, desk.words, ask.drafts)


def against(
    desk: Desk,
    goal: Goal,
    built: Built,
    spent: Speeds | None,
    cache: Mapping[str, int] | None = None,
    drafts: float = 1.0,
) -> tuple[str, Goal]:
    """What the artifact misses in words (empty: nothing), and the goal moved by it.

    Args:
        drafts: times as fast as it decodes by its weights.
    """
    missed: list[str] = []
    moved: list[Held] = []
    for one in goal.held:
        budget, bound = one.budget, one.bound
        if budget.resource == MEMORY:
            size = built.bytes + (cache or {}).get(budget.key, 0)
            if size > bound.limit:
                missed.append(f"{size:,} bytes where {bound.limit:,.0f} are allowed")
        else:
            assert spent is not None, "a speed is asked for"
            ratio = reached(spent, budget.resource) * (drafts if budget.resource == DECODE else 1.0)
            if ratio < budget.amount:
                missed.append(f"{budget.resource} at {ratio:.2f}x where {budget.amount:g}x is asked")
                bound = replace(bound, limit=max(one.least, bound.limit * max(0.7, ratio / budget.amount)))
        moved.append(replace(one, bound=bound))
    floors = dict(goal.floors)
    asked = desk.ask.floors.get("kl")
    if asked is not None and built.kl > asked:
        missed.append(f"KL {built.kl:.4g} where {asked:g} is the floor")
        floors["kl"] *= asked / built.kl
    return "; ".join(missed), Goal(tuple(moved), floors)
