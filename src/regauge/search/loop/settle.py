"""Which point is taken, and whether it keeps what was asked: build, measure, correct, repeat.

A memory budget is held against the bytes of the artifact's tensors, a speed against interleaved timings of the loaded
artifact and of the source in bf16 by the same runtime, a floor against true KL. Where a measurement misses, the bound
that the allocation sees is moved by what was missed, and the next artifact is built; what is held to stays as asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regauge.engine.drafting import Drafting
from regauge.errors import BudgetError
from regauge.measure.cost import COMPRESSED, Speeds
from regauge.search.allocation import Allocation, Bound, allocate, knee, sizes, span, sweep
from regauge.search.budgets import Budget
from regauge.search.drafting import DECODE
from regauge.search.loop.build import Built, build, cache_at, cache_growth, plan_for, speeds
from regauge.search.loop.caches import cached
from regauge.search.loop.desk import Desk
from regauge.search.loop.forecast import variants
from regauge.search.loop.gather import even, likely, nearest, outside, sample
from regauge.search.loop.goal import MEMORY, Goal, Held, against, drafts_of
from regauge.search.loop.problem import ROUGH, Problem, pairs
from regauge.search.losses.shelf import Pair
from regauge.search.profile import timed
from regauge.search.record import Build
from regauge.search.stores import whole_bytes

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
    speeds: Speeds | None
    goal: Goal
    drafts: Drafting | None = None


def settle(desk: Desk, problem: Problem) -> Settled:
    """The chosen point, built and measured.

    Raises:
        BudgetError: the budgets cannot be met, or what was built misses them after every correction.
    """
    ask, watch, source = desk.ask, desk.watch, desk.subject.source
    with watch.step("frontier"):
        if desk.timing is not None:
            problem = replace(problem, costs={name: desk.timing.costs[name] for name in timed(ask.budgets)})
        problem = replace(problem, counted=_counted(desk, problem))
        goal = Goal(tuple(_held(desk, problem, budget) for budget in ask.budgets), ask.floors)
        wanted, others = _wanted(desk, problem, goal)
    more = watch.can("variants beside what may win", watch.expected.get("rounding", 0.0))
    with watch.step("rounding"):
        problem.ready(wanted | others if more else wanted)
    with watch.step("trials"):
        tries = outside(problem, wanted) + sample(problem, wanted, ask.effort.checks // 2)
        problem.measure(tries[: watch.many("variants of one matrix", len(tries), _each(desk, singles=True))])
    with watch.step("frontier"):
        frontier = _frontier(problem, ask.effort.points)
    builds: list[Build] = []
    whole = watch.must.get("build", 0.0)
    missed, tried = "", set[tuple[int, ...]]()
    for attempt in range(ask.effort.builds):
        with watch.step("allocation"):
            point, why = _choose(desk, problem, goal, frontier)
        if point.picks in tried:
            break  # built again it would be the same
        if builds and not watch.can("another artifact", whole):
            raise BudgetError(
                f"--time is over after {len(builds)} artifacts, and the budgets are missed: {missed}. What was found "
                "is kept: run the same with more time, or ask for less."
            )
        tried.add(point.picks)
        predicted = problem.stored(problem.picks(point))
        with watch.step("build"):
            desk.clock.say("build", f"artifact {attempt + 1}: {predicted:,.0f} bytes predicted")
            picks = {name: option.name for name, option in problem.picks(point).items()}
            problem.release()
            built = build(desk, plan_for(picks, problem.groups, f"fit-{attempt}", desk.texts))
        with watch.step("timing"):
            spent = speeds(source, built.folder, ask.effort.turns) if timed(ask.budgets) else None
        problem = replace(problem, fixed=problem.fixed + built.bytes - predicted)
        caches = _caches(desk, problem, point)
        missed, moved = against(desk, goal, built, spent, caches)
        drafts = drafts_of(desk, built, missed)
        if drafts is not None and drafts.gain > 1:
            missed, moved = against(desk, goal, built, spent, caches, drafts.gain)
        goal = moved
        builds.append(_told(problem, point, built, spent, missed))
        if not missed:
            return Settled(problem, point, _with(frontier, point), built, tuple(builds), why, spent, goal, drafts)
    many = f"{len(builds)} artifacts" if len(builds) > 1 else "the best artifact that we know to make"
    raise BudgetError(f"after {many} the budgets are still missed: {missed}. Ask for less.")


def _wanted(desk: Desk, problem: Problem, goal: Goal) -> tuple[set[Pair], set[Pair]]:
    """What may win, by predictions alone; and what else is shown beside it."""
    effort, bounds = desk.ask.effort, goal.bounds(problem.fixed)
    frontier = _frontier(problem, effort.points)
    if not frontier:
        return set(), set()
    if not any(bound.resource == "bytes" for bound in bounds):
        if goal.floors:
            kept = [point for point in frontier if point.loss <= goal.floors["kl"]]
            aim = kept[0] if kept else frontier[-1]
        else:
            aim = frontier[knee([(point.takes["bytes"], point.loss) for point in frontier])]
        wanted = likely(problem, [Bound("bytes", aim.takes["bytes"]), *bounds], effort.draws, desk.ask.seed)
    else:
        aim = allocate(problem.candidates(), bounds, ROUGH)
        wanted = likely(problem, bounds, effort.draws, desk.ask.seed)
    shown = [problem.picks(frontier[i]) for i in nearest(frontier, aim.takes["bytes"], effort.shown)]
    uniform = even(problem, aim.takes["bytes"] + problem.fixed, effort.uniforms)
    return wanted, pairs(shown) | pairs(uniform.values())


def _held(desk: Desk, problem: Problem, budget: Budget) -> Held:
    """A budget as a row.

    Raises:
        BudgetError: its cache alone is larger.
    """
    source = desk.subject.source
    if budget.resource != "memory":
        assert desk.timing is not None, "a speed is asked for"
        before, fixed = desk.timing.base[budget.resource], desk.timing.fixed(budget.resource)
        least = 0.0
        if budget.resource == DECODE and desk.ask.drafting > 1:
            least = 1.001 * desk.timing.least(budget.resource)
        limit = max(least, before / budget.amount)
        return Held(budget, Bound(budget.resource, limit, fixed, "ms a token"), least=least)
    cache = 0.0
    if budget.context is not None:
        cache = max(0.0, budget.context * cache_growth(source) - whole_bytes(problem.groups, budget.context))
        if desk.ask.cache is not None:
            cache = float(cache_at(source, desk.ask.cache, budget.context))
    return Held(budget, Bound(_resource(desk, budget), budget.beside(cache, source.bytes_bf16()), problem.fixed), cache)


def _resource(desk: Desk, budget: Budget) -> str:
    """The row of a memory budget: `bytes` counts what stores take at the longest context that is asked about."""
    contexts = desk.ask.menu.contexts
    return "bytes" if not contexts or budget.context == contexts[0] else budget.key


def _counted(desk: Desk, problem: Problem) -> dict[str, int | None]:
    """The rows of other memory budgets."""
    asked = [budget for budget in desk.ask.budgets if budget.resource == MEMORY]
    return {name: budget.context for budget in asked if (name := _resource(desk, budget)) != "bytes"}


def _frontier(problem: Problem, points: int) -> tuple[Allocation, ...]:
    """Least predicted loss at a row of sizes, from the smallest that can be had to all sites at 8 bits."""
    candidates = problem.candidates()
    densest = [max(range(len(g.options)), key=lambda i, g=g: (g.options[i].bits <= 8, i)) for g in problem.groups]  # type: ignore[misc]  # the default binds the loop's variable
    low, high = span(candidates, problem.fixed, densest)
    return tuple(sweep(candidates, sizes(low * 1.05, high, points), problem.fixed))


def _with(frontier: Sequence[Allocation], point: Allocation) -> tuple[Allocation, ...]:
    """The frontier with the chosen point in its place by size."""
    others = [one for one in frontier if one.picks != point.picks]
    return tuple(sorted([*others, point], key=lambda one: one.takes["bytes"]))


def _choose(desk: Desk, problem: Problem, goal: Goal, frontier: Sequence[Allocation]) -> tuple[Allocation, str]:
    """The allocation to build, and why that one."""
    effort, bounds = desk.ask.effort, goal.bounds(problem.fixed)
    if goal.floors and not any(bound.resource == "bytes" for bound in bounds):
        why = f"the smallest that keeps KL under {desk.ask.floors['kl']:g}"
        return _smallest(problem, bounds, goal.floors["kl"], effort.checks // 4), why
    if bounds:
        why = "the least KL within the budgets"
    else:
        told = [point.loss for point in frontier]
        if effort.shown >= len(frontier):
            told = problem.measure([problem.picks(point) for point in frontier])
        index = knee([(point.takes["bytes"], kl) for point, kl in zip(frontier, told, strict=True)])
        bounds = [Bound("bytes", frontier[index].takes["bytes"] + problem.fixed, problem.fixed)]
        why = "no budget was given: the knee of the frontier, farthest below the chord of (bytes, √KL)"
    watch = desk.watch
    checks = watch.many("checks of what was chosen", effort.checks, _each(desk, singles=True))
    point = problem.sharpen(bounds, checks)
    near = watch.many("allocations around the best", effort.neighbours * effort.rounds, _each(desk))
    rounds = min(effort.rounds, near)
    if rounds:
        point = problem.refine(point, bounds, near // rounds, rounds, desk.ask.seed)
    return point, why


def _each(desk: Desk, singles: bool = False) -> float:
    """Seconds that a variant is expected to take: of one group, or of all."""
    counts = variants(desk.ask.effort)
    if singles:
        return desk.watch.expected.get("trials", 0.0) / max(1, counts[0])
    return desk.watch.expected.get("allocation", 0.0) / max(1, counts[1])


def _smallest(problem: Problem, bounds: Sequence[Bound], floor: float, checks: int) -> Allocation:
    """The fewest bytes whose true KL on the search text stays under the floor: bisection over sizes."""
    candidates = problem.candidates()
    low = sum(min(option.takes["bytes"] for option in group) for group in candidates)
    high = sum(max(option.takes["bytes"] for option in group) for group in candidates)
    best = allocate(candidates, [Bound("bytes", high), *bounds])
    for _ in range(8):
        middle = (low * high) ** 0.5
        try:
            point = problem.sharpen([Bound("bytes", middle), *bounds], checks, rounds=1)
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


def _caches(desk: Desk, problem: Problem, point: Allocation) -> dict[str, int]:
    return {budget.key: cached(problem, problem.picks(point), budget) for budget in desk.ask.budgets}


def _told(problem: Problem, point: Allocation, built: Built, spent: Speeds | None, missed: str) -> Build:
    return Build(
        point=f"{problem.stored(problem.picks(point)):,.0f} bytes",
        bytes=built.bytes,
        kl=built.kl,
        decode=None if spent is None else f"{spent['decode'][COMPRESSED].median:.1f} tokens/s",
        why=missed or "kept",
    )
