"""Which options can win, so that they are rounded in one pass; and which are measured before anything is decided.

The optimum under losses that are as far off as predictions are is what later steps may choose. So the program is solved
under a handful of jittered losses, at what is aimed at, and whatever some solution takes is rounded. An option that is
chosen all the same and is not among them is rounded when it is asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence

from regauge.errors import BudgetError
from regauge.search.allocation import Allocation, Bound, allocate
from regauge.search.loop.problem import ROUGH, Problem, pairs
from regauge.search.losses.shelf import Pair
from regauge.search.losses.trials import Picks
from regauge.search.options import FULL, Option

UNIFORMS = ("int3-g128", "int4-g128", "int4-g32", "int5-g128", "int6-g128", "int8-channel")
CACHES = ("", "+k8v8-g32", "+k4v4-g32", "+k2v2-g32")
"""Behind the names of uniforms, where stores are chosen too: whole, or KIVI's formats everywhere."""
BESIDE = 4  # of them all that are shown then
INSIDE, OUTSIDE = 0.25, 0.8
"""By how much the log of a group's losses is off: of those in blocks, and of embedding and head, told more rudely."""
APART = 0.15
"""The same of one option of a group against another."""


def likely(problem: Problem, bounds: Sequence[Bound], draws: int, seed: int) -> set[Pair]:
    """What the best choice may be made of, within bounds."""
    chance = random.Random(seed)
    losses, found = problem.losses(), set[Pair]()
    for draw in range(draws + 1):
        moved = losses if draw == 0 else {name: _jittered(problem, name, losses[name], chance) for name in losses}
        try:
            found |= pairs([problem.picks(allocate(problem.candidates(moved), bounds, ROUGH))])
        except BudgetError:
            if draw == 0:
                raise
    return found


def _jittered(problem: Problem, name: str, options: Mapping[str, float], chance: random.Random) -> dict[str, float]:
    width = OUTSIDE if problem.group(name).block is None else INSIDE
    all_of_it = chance.gauss(0.0, width)
    return {option: loss * math.exp(all_of_it + chance.gauss(0.0, APART)) for option, loss in options.items()}


def outside(problem: Problem, wanted: Iterable[Pair]) -> list[Picks]:
    """The options that may win of the groups whose predictions are rude: embedding and head."""
    some = set(wanted)
    return [
        {group.name: option}
        for group in problem.groups
        if group.block is None
        for option in group.options
        if (group.name, option.name) in some
    ]


def sample(problem: Problem, wanted: Iterable[Pair], count: int) -> list[Picks]:
    """Single-group variants spread over depth, kinds and grains, of what may win, to check predictions by."""
    some = set(wanted)
    inner = [group for group in problem.groups if group.block is not None]
    step = max(1, len(inner) // max(count, 1))
    picks: list[Picks] = []
    for place, group in enumerate(inner[::step][:count]):
        chosen = [option for option in group.options if (group.name, option.name) in some]
        plain = chosen or [option for option in group.options if option.bits == 4] or list(group.options[:1])
        option = plain[place % len(plain)]
        if option.name != FULL:
            picks.append({group.name: option})
    return picks


def nearest(points: Sequence[Allocation], size: float, count: int) -> list[int]:
    """The indices of the points nearest to a size, in order."""
    order = sorted(range(len(points)), key=lambda i: (abs(math.log(points[i].takes["bytes"] / size)), i))
    return sorted(order[:count])


def even(problem: Problem, size: float, count: int) -> dict[str, dict[str, Option]]:
    """Every site alike, at the sizes nearest to that of an artifact: what the reader would otherwise take."""
    names: tuple[str, ...] = UNIFORMS
    if any(group.store is not None for group in problem.groups):
        names, count = tuple(name + cache for name in UNIFORMS for cache in CACHES), min(count, BESIDE)
    found = {name: picks for name in names if (picks := problem.uniform(name)) is not None}
    near = {name: picks for name, picks in found.items() if 0.7 * size <= problem.size(picks) <= 1.5 * size}
    near = near or dict(list(found.items())[-1:])

    def rank(name: str) -> tuple[bool, float]:  # what the artifact is compared with is nearly as large at the least
        return problem.size(near[name]) < 0.9 * size, abs(math.log(problem.size(near[name]) / size))

    order = sorted(near, key=rank)[:count]
    return {name: near[name] for name in near if name in order}
