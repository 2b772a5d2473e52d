"""A ranking from runs of which some are missing, and the run that would decide most (ONEBench, 2412.06745).

Methods are compared window by window, by order alone, so nothing of different units is averaged: of two methods on a
window the one with less KL wins, and a tie gives each a win. Worths are those of Plackett-Luce on the pairs (Bradley
and Terry's model), by Hunter's minorisation (2004), with a little of every outcome added (α = 0.01, as its authors do).

Where we differ: each model and text is one vote for a pair, shared by its windows. Windows of one text go together, and
a ranking over models is uncertain by how few models there are, not by how few windows.
Legend: M methods; g a model and text.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.special import ndtr

from regauge.measure.bootstrap import Floats

ALPHA = 0.01
STEPS, CLOSE = 10000, 1e-10
Scored = Mapping[str, Floats]
"""Method → KL of each window of one model and text; lower = better."""


def wins(scored: Scored, methods: Sequence[str]) -> Floats:
    """(M, M): the share of windows on which the row's method beats the column's; a tie counts for both, and shares of a
    pair that met sum to 1. 0 where they did not meet."""
    found_MM = np.zeros((len(methods), len(methods)))
    for i, one in enumerate(methods):
        for j, other in enumerate(methods):
            if i != j and one in scored and other in scored:
                better = float((scored[one] < scored[other]).sum() + (scored[one] == scored[other]).sum())
                worse = float((scored[one] > scored[other]).sum() + (scored[one] == scored[other]).sum())
                found_MM[i, j] = better / (better + worse)
    return found_MM


def pools(won_MM: Floats) -> list[list[int]]:
    """Methods that a chain of comparisons joins, the largest pool first."""
    met = (won_MM + won_MM.T) > 0
    left, found = set(range(len(won_MM))), []
    while left:
        pool, edge = set[int](), {min(left)}
        while edge:
            pool |= edge
            edge = {int(j) for i in edge for j in np.flatnonzero(met[i])} - pool
        left -= pool
        found.append(sorted(pool))
    return sorted(found, key=lambda pool: -len(pool))


def worths(won_MM: Floats) -> Floats:
    """(M,) log worths of mean 0; higher = wins more.

    Raises:
        ValueError: no chain of comparisons joins them all.
    """
    count = len(won_MM)
    if count and len(pools(won_MM)) > 1:
        raise ValueError("methods that never met, not even by way of others, have no order")
    met = (won_MM + won_MM.T) > 0
    won = won_MM + ALPHA * met
    games = won + won.T
    worth = np.ones(count)
    for _ in range(STEPS if count > 1 else 0):
        new = won.sum(1) / (games / (worth[:, None] + worth[None, :])).sum(1)
        new /= np.exp(np.log(new).mean())
        done = float(np.abs(np.log(new / worth)).max()) < CLOSE
        worth = new
        if done:
            break
    found: Floats = np.log(worth)
    return found


def information(games_MM: Floats, log_M: Floats) -> Floats:
    """(M, M) Fisher information of the log worths after so many comparisons of each pair."""
    chance = 1 / (1 + np.exp(log_M[None, :] - log_M[:, None]))
    weight = games_MM * chance * (1 - chance)
    np.fill_diagonal(weight, 0.0)
    found: Floats = np.diag(weight.sum(1)) - weight
    return found


def doubt(information_MM: Floats, log_M: Floats) -> float:
    """How many neighbours in the ranking are expected to stand in the wrong order."""
    spread = np.linalg.inv(information_MM + ALPHA * np.eye(len(log_M)))
    order = np.argsort(-log_M, kind="stable")
    a, b = order[:-1], order[1:]
    variance = spread[a, a] + spread[b, b] - 2 * spread[a, b]
    return float(ndtr(-(log_M[a] - log_M[b]) / np.sqrt(variance)).sum())


def deciding(groups: Mapping[Hashable, Scored], methods: Sequence[str]) -> tuple[str, Hashable] | None:
    """The run (method, group) that was not made and would leave the least doubt about the order; where pools never met,
    one that joins two of them, as large as there are. None where every run was made."""
    shares = {g: wins(scored, methods) for g, scored in groups.items()}
    total = sum(shares.values(), np.zeros((len(methods), len(methods))))
    missing = [(m, g) for m in methods for g, scored in groups.items() if m not in scored]
    apart = pools(total)
    if not missing:
        return None
    if len(apart) > 1:
        home = {methods[i]: number for number, pool in enumerate(apart) for i in pool}
        joins = [(m, g) for m, g in missing if any(home[o] != home[m] for o in groups[g])]
        return max(joins, key=lambda run: len(apart[home[run[0]]]) * len(groups[run[1]]))
    log_M = worths(total)
    games = total + total.T

    def left(run: tuple[str, Hashable]) -> float:
        method, more = methods.index(run[0]), games.copy()
        for other in groups[run[1]]:
            j = methods.index(other)
            more[method, j] += 1
            more[j, method] += 1
        return doubt(information(more, log_M), log_M)

    return min(missing, key=left)
