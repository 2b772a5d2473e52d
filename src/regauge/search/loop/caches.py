"""What a search chose of each block's cache, and what it takes."""

from __future__ import annotations

from regauge.amounts import told
from regauge.plan.keeping import bits_of
from regauge.search.allocation import Allocation
from regauge.search.budgets import Budget
from regauge.search.loop.problem import Problem
from regauge.search.losses.trials import Picks
from regauge.search.record import CachePick
from regauge.search.stores import all_bytes, read_bytes, scheme_of, store_bytes


def cached(problem: Problem, picks: Picks, budget: Budget) -> int:
    """Bytes of the stores that are chosen, at the context of a budget."""
    return 0 if budget.context is None else all_bytes(problem.groups, picks, budget.context)


def picked(problem: Problem, point: Allocation) -> tuple[CachePick, ...]:
    """What each store got."""
    losses, picks = problem.losses(), problem.picks(point)
    found = []
    for group in problem.groups:
        option, store = picks[group.name], group.store
        if store is not None:
            keys, values = (16, 16) if option.choice is None else bits_of(option.choice)
            size, kl = store_bytes(group, option, store.tokens), losses[group.name][option.name]
            one = CachePick(
                name=group.name,
                block=store.block,
                option=option.name,
                keys=keys,
                values=values,
                tokens=store.tokens,
                bytes=size,
                kl_predicted=kl,
            )
            found.append(one)
    return tuple(found)


def filled(problem: Problem, point: Allocation, context: int) -> str:
    """What the chosen stores hold once they have seen so many tokens, as read from them; "" where none was chosen."""
    picks = problem.picks(point)
    chosen = [(group, group.store, picks[group.name].choice) for group in problem.groups]
    schemes = [(scheme_of(choice, store.sizes), store.sizes) for _, store, choice in chosen if store is not None]
    if not schemes:
        return ""
    each = {one: read_bytes(*one, context) for one in set(schemes)}
    return f" by its formats; its stores, filled, take {told(sum(each[one] for one in schemes))} with room to grow"


def noted(problem: Problem, point: Allocation, length: int) -> list[str]:
    """What a reader must know of how a cache was judged; nothing where none was chosen."""
    found = picked(problem, point)
    if not found:
        return []
    return [
        f"the cache is counted at {found[0].tokens:,} tokens by its formats, and its KL was measured on windows of "
        f"{length:,} tokens, where every token reads what decoding one after another would have kept of those before; "
        "no tokens are let go, and what a speed budget asks of a cache is not counted"
    ]


def by_recipe(cache: str | None) -> tuple[str, ...]:
    """What figures do not hold where the cache is kept by a recipe."""
    if cache is None:
        return ()
    return (
        f"the artifact keeps its cache by {cache}; quality here is of its weights, read at once: "
        "`regauge measure` reads it with the cache",
    )
