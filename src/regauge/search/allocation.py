"""Which option each group of sites takes: a mixed-integer program, every budget a row; and the frontier over sizes.

Minimise the sum of predicted KL over groups, with exactly one option a group and each resource (bytes, decode ms,
prefill ms) at most its bound. Solved by HiGHS through SciPy (Huangfu & Hall 2018), to a relative gap of 1e-6: a
multiple-choice knapsack of a few hundred groups takes milliseconds.

The frontier is the least loss at each of a row of sizes; its knee is what is taken where nobody says.

Lower = better throughout. Legend: G groups, C candidates (all options of all groups, one after another), R resources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from regauge.errors import BudgetError

Floats = NDArray[np.float64]
PATIENCE = 30.0  # seconds that one program may take
TIMED_OUT = 1  # of milp's statuses


@dataclass(frozen=True)
class Candidate:
    """One option of one group: what it loses (predicted KL, nats a token) and what it takes of each resource."""

    loss: float
    takes: Mapping[str, float]


@dataclass(frozen=True)
class Allocation:
    """The option index of each group, with the totals."""

    picks: tuple[int, ...]
    loss: float
    takes: Mapping[str, float]


@dataclass(frozen=True)
class Bound:
    """An upper bound on a resource, with what is spent whatever is chosen (norms, biases, run-time overhead)."""

    resource: str
    limit: float
    fixed: float = 0.0
    unit: str = "bytes"


def total(groups: Sequence[Sequence[Candidate]], picks: Sequence[int]) -> Allocation:
    """Totals of given picks."""
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    names = sorted({name for candidate in chosen for name in candidate.takes})
    takes = {name: float(sum(candidate.takes.get(name, 0.0) for candidate in chosen)) for name in names}
    return Allocation(tuple(picks), float(sum(candidate.loss for candidate in chosen)), takes)


def allocate(groups: Sequence[Sequence[Candidate]], bounds: Sequence[Bound], gap: float = 1e-6) -> Allocation:
    """The least predicted loss within every bound, to a relative `gap`; BudgetError says how near one can come."""
    for bound in bounds:
        _reachable(groups, bound)
    flat = [candidate for group in groups for candidate in group]
    if not flat:
        return Allocation((), 0.0, {})
    loss_C = np.array([candidate.loss for candidate in flat])
    scale = float(np.abs(loss_C).max()) or 1.0
    x_C = _solve(loss_C / scale, _rows(groups, flat, bounds), gap)
    if x_C is None:
        raise BudgetError(_clash(groups, bounds))
    return total(groups, _picks(groups, x_C))


def _solve(loss_C: Floats, rows: list[LinearConstraint], gap: float | None = None) -> Floats | None:
    """The choice that costs least, one entry a candidate; None where no choice meets every row.

    Raises:
        BudgetError: the solver ran out of its time before it found a choice.
    """
    options = {"time_limit": PATIENCE} | ({} if gap is None else {"mip_rel_gap": gap})
    found = milp(loss_C, constraints=rows, integrality=np.ones(len(loss_C)), bounds=Bounds(0, 1), options=options)
    if found.x is None and found.status == TIMED_OUT:
        raise BudgetError(
            f"the solver ran out of its time ({PATIENCE:.0f} s) before it found a choice that meets the budgets; "
            "run again on an idle machine, or give fewer budgets"
        )
    x_C: Floats | None = found.x
    return x_C


def _rows(
    groups: Sequence[Sequence[Candidate]], flat: Sequence[Candidate], bounds: Sequence[Bound]
) -> list[LinearConstraint]:
    owner_C = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    one_GC = csr_matrix((np.ones(len(flat)), (owner_C, np.arange(len(flat)))), shape=(len(groups), len(flat)))
    rows = [LinearConstraint(one_GC, 1, 1)]
    for bound in bounds:
        takes_C = np.array([candidate.takes.get(bound.resource, 0.0) for candidate in flat])
        room = bound.limit - bound.fixed
        size = max(abs(room), float(np.abs(takes_C).max()), 1e-30)  # rows near 1 keep HiGHS's tolerances meaningful
        rows.append(LinearConstraint(csr_matrix(takes_C[None] / size), -np.inf, room / size))
    return rows


def _picks(groups: Sequence[Sequence[Candidate]], x_C: Floats) -> list[int]:
    picks: list[int] = []
    at = 0
    for group in groups:
        picks.append(int(np.argmax(x_C[at : at + len(group)])))
        at += len(group)
    return picks


def least(groups: Sequence[Sequence[Candidate]], resource: str) -> float:
    """The least of a resource that any choice can take."""
    return float(sum(min(candidate.takes.get(resource, 0.0) for candidate in group) for group in groups))


def _reachable(groups: Sequence[Sequence[Candidate]], bound: Bound) -> None:
    floor = least(groups, bound.resource) + bound.fixed
    if floor > bound.limit * (1 + 1e-12):
        raise BudgetError(
            f"{bound.resource} can come down to {floor:,.6g} {bound.unit} at the least "
            f"({bound.fixed:,.6g} of it whatever is chosen), and the budget is {bound.limit:,.6g} {bound.unit}: "
            f"{floor / bound.limit:.3g} times what it allows. Raise the budget."
        )


def _clash(groups: Sequence[Sequence[Candidate]], bounds: Sequence[Bound]) -> str:
    """Every bound can be met alone, but not all together: how near does each come under the others?"""
    near: list[str] = []
    for bound in bounds:
        others = [other for other in bounds if other is not bound]
        flat = [candidate for group in groups for candidate in group]
        takes_C = np.array([candidate.takes.get(bound.resource, 0.0) for candidate in flat])
        x_C = _solve(takes_C / (float(np.abs(takes_C).max()) or 1.0), _rows(groups, flat, others))
        if x_C is not None:
            reached = total(groups, _picks(groups, x_C)).takes.get(bound.resource, 0.0) + bound.fixed
            near.append(f"{bound.resource} {reached:,.6g} of {bound.limit:,.6g} {bound.unit}")
    return (
        "the budgets cannot be met together; with the others met, each comes down to: "
        + ("; ".join(near) or "nothing")
        + ". Raise one of them."
    )


def sizes(low: float, high: float, count: int) -> list[float]:
    """So many sizes between two, evenly in their logarithm."""
    if count == 1 or high <= low:
        return [high]
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


def sweep(
    groups: Sequence[Sequence[Candidate]], limits: Sequence[float], fixed: float, others: Sequence[Bound] = ()
) -> list[Allocation]:
    """The allocation at each size that can be had under the other bounds, without repeats, smallest first."""
    found: dict[tuple[int, ...], Allocation] = {}
    for limit in sorted(limits):
        try:
            point = allocate(groups, [Bound("bytes", limit, fixed), *others], gap=1e-4)
        except BudgetError:
            continue
        found.setdefault(point.picks, point)
    return pareto(list(found.values()))


def pareto(points: Sequence[Allocation]) -> list[Allocation]:
    """Those that no other beats in both bytes and loss, smallest first."""
    kept: list[Allocation] = []
    for point in sorted(points, key=lambda point: (point.takes["bytes"], point.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept


def span(groups: Sequence[Sequence[Candidate]], fixed: float, densest: Sequence[int]) -> tuple[float, float]:
    """Smallest size that can be had, and the size at given picks (the largest worth showing)."""
    high = sum(group[pick].takes["bytes"] for group, pick in zip(groups, densest, strict=True))
    return least(groups, "bytes") + fixed, high + fixed


def knee(points: Sequence[tuple[float, float]]) -> int:
    """Index of the knee of (bytes, KL): the point farthest below the chord of (bytes, √KL), both scaled to 0 … 1.

    KL is quadratic in the error of the weights, so its root falls as the step does, by half a bit; on a plain
    exponential of 2 to 8 bits the rule picks 4. Two points or fewer: the larger, which loses less.
    """
    if not points:
        raise BudgetError("there is no point to choose from.")
    if len(points) < 3:
        return max(range(len(points)), key=lambda index: points[index][0])
    size = [point[0] for point in points]
    root = [math.sqrt(max(point[1], 0.0)) for point in points]
    wide, tall = max(size) - min(size), max(root) - min(root)
    if wide <= 0 or tall <= 0:
        return min(range(len(points)), key=lambda index: points[index])
    drop = [1 - (s - min(size)) / wide - (r - min(root)) / tall for s, r in zip(size, root, strict=True)]
    return max(range(len(points)), key=lambda index: drop[index])
