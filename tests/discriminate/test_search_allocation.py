"""The allocation is the best there is: against brute force on small instances, and against uniform."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from regauge.errors import BudgetError
from regauge.search.allocation import Bound, Candidate, allocate, least, total


def instance(seed: int, groups: int = 5, options: int = 4) -> list[list[Candidate]]:
    """Loss falls with bytes, at a rate that differs by group; time does not follow bytes."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(groups):
        weight, size = generator.lognormal(0, 1.5), generator.integers(1, 9)
        found.append(
            [
                Candidate(
                    float(weight * 4.0**-bits * generator.lognormal(0, 0.3)),
                    {"bytes": float(size * (bits + 1)), "ms": float(generator.uniform(0.1, 1.0))},
                )
                for bits in range(1, options + 1)
            ]
        )
    return found


def brute(groups: list[list[Candidate]], bounds: list[Bound]) -> float | None:
    best = None
    for picks in itertools.product(*[range(len(group)) for group in groups]):
        sums = total(groups, picks)
        if all(sums.takes[bound.resource] + bound.fixed <= bound.limit * (1 + 1e-12) for bound in bounds):
            best = sums.loss if best is None else min(best, sums.loss)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force(seed: int) -> None:
    groups = instance(seed)
    limit = least(groups, "bytes") * 1.6 + 2
    slow = least(groups, "ms") * 1.8
    for bounds in (
        [Bound("bytes", limit)],
        [Bound("bytes", limit + 7, fixed=7.0)],
        [Bound("bytes", limit), Bound("ms", slow, unit="ms")],
    ):
        expected = brute(groups, bounds)
        if expected is None:
            with pytest.raises(BudgetError):
                allocate(groups, bounds)
            continue
        found = allocate(groups, bounds)
        assert found.loss == pytest.approx(expected, rel=1e-6)
        for bound in bounds:
            assert found.takes[bound.resource] + bound.fixed <= bound.limit * (1 + 1e-9)


def test_beats_uniform_where_groups_differ_and_equals_it_where_they_do_not() -> None:
    groups = [[Candidate(weight * 4.0**-b, {"bytes": float(b)}) for b in (2, 3, 4)] for weight in (64, 32, 2, 1)]
    uniform = total(groups, [1] * len(groups))  # 3 bits everywhere: 99/64 nats, 12 bytes
    found = allocate(groups, [Bound("bytes", uniform.takes["bytes"])])
    assert found.picks == (2, 2, 0, 0)
    assert found.loss == pytest.approx(0.5625)  # 64/256 + 32/256 + 2/16 + 1/16
    same = [[Candidate(4.0**-bits, {"bytes": float(bits)}) for bits in (2, 3, 4)] for _ in range(4)]
    assert allocate(same, [Bound("bytes", 12.0)]).picks == (1, 1, 1, 1)


def test_without_bounds_the_least_loss_is_taken() -> None:
    groups = instance(2)
    assert allocate(groups, []).loss == pytest.approx(sum(min(c.loss for c in group) for group in groups))


def test_an_impossible_budget_says_how_near_it_came() -> None:
    groups = [[Candidate(1.0, {"bytes": 40.0}), Candidate(0.5, {"bytes": 60.0})]] * 2
    with pytest.raises(BudgetError, match=r"come down to 90 bytes at the least \(10 of it .*budget is 50 bytes: 1\.8"):
        allocate(groups, [Bound("bytes", 50.0, fixed=10.0)])


def test_budgets_that_clash_are_told_apart() -> None:
    groups = [[Candidate(1.0, {"bytes": 1.0, "ms": 9.0}), Candidate(1.0, {"bytes": 9.0, "ms": 1.0})]]
    with pytest.raises(BudgetError, match=r"cannot be met together.*bytes 9 of 2 bytes; ms 9 of 2 ms"):
        allocate(groups, [Bound("bytes", 2.0), Bound("ms", 2.0, unit="ms")])


def test_a_solver_that_ran_out_of_time_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as budgets that cannot be met."""
    groups = [[Candidate(float(i * j % 7), {"bytes": float(i + j)}) for j in range(4)] for i in range(30)]
    monkeypatch.setattr("regauge.search.allocation.PATIENCE", 1e-9)
    with pytest.raises(BudgetError, match=r"ran out of its time .* before it found a choice"):
        allocate(groups, [Bound("bytes", 480.0)])
