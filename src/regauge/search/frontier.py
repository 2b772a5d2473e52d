"""Points worth having: for a row of sizes, the least loss at each; and which to take when nobody says.

Legend of units: bytes of the artifact's tensors; KL in nats a token, lower = better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from regauge.errors import BudgetError
from regauge.search.allocation import Allocation, Bound, Candidate, allocate, least


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
