"""Which point is taken, and whether it keeps what was asked: build, measure, correct, repeat.

A memory budget is held against the bytes of the artifact's tensors, a speed against interleaved timings of the loaded
artifact and the source in bf16, a floor against true KL. Where a measurement misses, the bound that the allocation sees
is moved by what was missed, and the next artifact is built.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from regauge.engine.watchdog import Clock
from regauge.errors import BudgetError
from regauge.measure.cost import Speed, cache_bytes_a_token
from regauge.search.allocation import Allocation, Bound, allocate
from regauge.search.budgets import Budget
from regauge.search.build import Built, build, in_bf16, speeds
from regauge.search.effort import Effort, Stopwatch
from regauge.search.finish import plan_for
from regauge.search.frontier import knee, sizes, span, sweep
from regauge.search.problem import Problem
from regauge.search.profile import Timing, timed
from regauge.search.record import Build
from regauge.search.steps import Desk
from regauge.text.split import Texts

MARGIN = 0.95  # of a floor: what the search text must show, so that other text shows it too


@dataclass(frozen=True, eq=False)
class Settled:
    """The point taken, with its artifact and the frontier around it."""

    problem: Problem
    point: Allocation
    frontier: tuple[Allocation, ...]
    built: Built
    builds: tuple[Build, ...]
    why: str
    speeds: Mapping[str, Mapping[str, Speed]] | None
    bounds: tuple[Bound, ...]


def settle(
    problem: Problem,
    asked: Sequence[Budget],
    floors: Mapping[str, float],
    timing: Timing | None,
    texts: Texts,
    desk: Desk,
    effort: Effort,
    seed: int,
    clock: Clock,
    watch: Stopwatch,
    command: str,
) -> Settled:
    """The chosen point, built and measured.

    Raises:
        BudgetError: the budgets cannot be met, or what was built misses them after every correction.
    """
    started = time.monotonic()
    bounds, problem = _bounds(problem, asked, timing)
    frontier = _frontier(problem, bounds, effort)
    watch.lap("frontier", started)
    builds: list[Build] = []
    nearest = ""
    for attempt in range(effort.builds):
        started = time.monotonic()
        point, why = _choose(problem, bounds, floors, frontier, effort, seed, watch)
        watch.lap("allocation", started)
        started = time.monotonic()
        clock.say("build", f"artifact {attempt + 1}: {problem.size(problem.picks(point)):,.0f} bytes predicted")
        plan = plan_for(
            {name: option.name for name, option in problem.picks(point).items()},
            problem.subject.source,
            f"fit-{attempt}",
            texts,
        )
        built = build(plan, problem.subject, texts, desk.folder / "build", seed, command, clock.watcher)
        watch.lap("build", started)
        started = time.monotonic()
        spent = speeds(problem.subject.source, built.folder, effort.turns) if timed(asked) else None
        watch.lap("timing", started)
        problem = replace(problem, fixed=problem.fixed + built.bytes - problem.size(problem.picks(point)))
        missed, bounds, floors_missed = _held(problem, bounds, asked, floors, built, spent)
        builds.append(
            Build(
                point=f"{problem.size(problem.picks(point)):,.0f} bytes",
                bytes=built.bytes,
                kl=built.kl,
                decode=None if spent is None else f"{spent['decode']['compressed'].median:.1f} tokens/s",
                why=missed or "kept",
            )
        )
        if not missed:
            frontier = _with(problem, frontier, point)
            return Settled(problem, point, frontier, built, tuple(builds), why, spent, tuple(bounds))
        nearest = missed
        if floors_missed:
            floors = {name: limit * floors_missed for name, limit in floors.items()}
    raise BudgetError(f"after {effort.builds} artifacts the budgets are still missed: {nearest}. Ask for less.")


def _bounds(problem: Problem, asked: Sequence[Budget], timing: Timing | None) -> tuple[list[Bound], Problem]:
    """Budgets as rows."""
    source = problem.subject.source
    whole = source.bytes_bf16()
    bounds: list[Bound] = []
    for budget in asked:
        if budget.resource == "memory":
            cache = 0.0
            if budget.context is not None:
                cache = budget.context * cache_bytes_a_token(in_bf16(source), torch.ones(1, 32, dtype=torch.int64))
                if cache >= budget.bytes(whole):
                    raise BudgetError(
                        f"{budget.text!r} allows {budget.bytes(whole):,} bytes; the cache alone takes {cache:,.0f} at "
                        f"{budget.context:,} tokens; ask for a shorter context or more."
                    )
            bounds.append(Bound("bytes", budget.bytes(whole) - cache, problem.fixed))
    if timing is not None:
        problem = replace(problem, costs={name: timing.costs[name] for name in timed(asked)})
        for budget in asked:
            if budget.resource != "memory":
                before = timing.source[budget.resource]
                bounds.append(
                    Bound(budget.resource, before / budget.amount, timing.fixed(budget.resource), "ms a token")
                )
    return bounds, problem


def _frontier(problem: Problem, bounds: Sequence[Bound], effort: Effort) -> tuple[Allocation, ...]:
    """Least predicted loss at a row of sizes, from the smallest that can be had to all sites at 8 bits."""
    candidates = problem.candidates()
    densest = [max(range(len(g.options)), key=lambda i, g=g: (g.options[i].bits <= 8, i)) for g in problem.groups]  # type: ignore[misc]  # the default binds the loop's variable
    low, high = span(candidates, problem.fixed, densest)
    return tuple(sweep(candidates, sizes(low * 1.05, high, effort.points), problem.fixed))


def _with(problem: Problem, frontier: Sequence[Allocation], point: Allocation) -> tuple[Allocation, ...]:
    """The frontier with the chosen point in its place by size."""
    others = [one for one in frontier if one.picks != point.picks]
    return tuple(sorted([*others, point], key=lambda one: one.takes["bytes"]))


def _choose(
    problem: Problem,
    bounds: Sequence[Bound],
    floors: Mapping[str, float],
    frontier: Sequence[Allocation],
    effort: Effort,
    seed: int,
    watch: Stopwatch,
) -> tuple[Allocation, str]:
    """The allocation to build, and why that one."""
    bounds = [replace(bound, fixed=problem.fixed) if bound.resource == "bytes" else bound for bound in bounds]
    if floors and not any(bound.resource == "bytes" for bound in bounds):
        return _smallest(problem, bounds, floors["kl"], effort), f"the smallest that keeps KL under {floors['kl']:g}"
    if bounds:
        why = "the least KL within the budgets"
    else:
        found = problem.measure([problem.picks(point) for point in frontier])
        index = knee([(point.takes["bytes"], kl) for point, kl in zip(frontier, found, strict=True)])
        bounds = [Bound("bytes", frontier[index].takes["bytes"] + problem.fixed, problem.fixed)]
        why = "no budget was given: the knee of the frontier, farthest below the chord of (bytes, √KL)"
    point = problem.sharpen(bounds, effort.checks)
    if not watch.over(0.5):
        point = problem.refine(point, bounds, effort.neighbours, effort.rounds, seed)
    return point, why


def _smallest(problem: Problem, bounds: Sequence[Bound], floor: float, effort: Effort) -> Allocation:
    """The fewest bytes whose true KL on the search text stays under the floor: bisection over sizes."""
    candidates = problem.candidates()
    low = sum(min(option.takes["bytes"] for option in group) for group in candidates)
    high = sum(max(option.takes["bytes"] for option in group) for group in candidates)
    best = allocate(candidates, [Bound("bytes", high), *bounds])
    for _ in range(8):
        middle = (low * high) ** 0.5
        try:
            point = problem.sharpen([Bound("bytes", middle), *bounds], effort.checks // 4, rounds=1)
        except BudgetError:
            low = middle
            continue
        if problem.measure([problem.picks(point)])[0] <= MARGIN * floor:
            best, high = point, middle
        else:
            low = middle
        if high / low < 1.02:
            break
    return best


def _held(
    problem: Problem,
    bounds: Sequence[Bound],
    asked: Sequence[Budget],
    floors: Mapping[str, float],
    built: Built,
    spent: Mapping[str, Mapping[str, Speed]] | None,
) -> tuple[str, list[Bound], float]:
    """What the artifact misses in words (empty: nothing), bounds moved by it, and the factor for the floor."""
    missed: list[str] = []
    moved: list[Bound] = []
    for bound in bounds:
        if bound.resource == "bytes":
            if built.bytes > bound.limit:
                missed.append(f"{built.bytes:,} bytes where {bound.limit:,.0f} are allowed")
            moved.append(replace(bound, fixed=problem.fixed))
            continue
        assert spent is not None, "a speed is asked for"
        ratio = next(budget.amount for budget in asked if budget.resource == bound.resource)
        pair = spent[bound.resource]
        reached = pair["compressed"].median / pair["original"].median
        if reached < ratio:
            missed.append(f"{bound.resource} at {reached:.2f}x where {ratio:g}x is asked")
            moved.append(replace(bound, limit=bound.limit * max(0.7, reached / ratio)))
        else:
            moved.append(bound)
    factor = 0.0
    if "kl" in floors and built.kl > floors["kl"]:
        missed.append(f"KL {built.kl:.4g} where {floors['kl']:g} is the floor")
        factor = floors["kl"] / built.kl
    return "; ".join(missed), moved, factor
