"""A ranking from incomplete runs: by hand, and the checks that its paper's reading asks for."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kendalltau

from regauge.ranking.worth import ALPHA, deciding, pools, wins, worths


def test_wins_by_hand_and_a_tie_counts_for_both() -> None:
    scored = {"a": np.array([1.0, 1.0, 3.0, 5.0]), "b": np.array([2.0, 2.0, 1.0, 5.0])}
    won = wins(scored, ["a", "b", "c"])
    assert won.tolist() == [[0, 0.6, 0], [0.4, 0, 0], [0, 0, 0]]  # a 2 + 1, b 1 + 1 of five


def test_worths_of_two_by_hand() -> None:
    """The odds are those of the wins, α added to both."""
    found = worths(np.array([[0.0, 3.0], [1.0, 0.0]]))
    assert found[0] - found[1] == pytest.approx(np.log((3 + ALPHA) / (1 + ALPHA)), abs=1e-6)
    assert found.sum() == pytest.approx(0)


def planted(
    seed: int, shown: float, models: int = 12, groups: int = 40
) -> tuple[list[str], dict[object, dict[str, np.ndarray]]]:
    """Methods of planted strengths, `m0` the best, on many texts; of each run only a share is shown."""
    draw = np.random.default_rng(seed)
    methods = [f"m{i}" for i in range(models)]
    found: dict[object, dict[str, np.ndarray]] = {}
    for group in range(groups):
        hard = draw.normal(size=16)
        runs = {m: hard + 0.7 * i + draw.gumbel(size=16) for i, m in enumerate(methods) if draw.random() < shown}
        if len(runs) > 1:
            found[group] = runs
    return methods, found


def total(methods: list[str], groups: dict[object, dict[str, np.ndarray]]) -> np.ndarray:
    return np.sum([wins(scored, methods) for scored in groups.values()], axis=0)


def test_most_of_the_runs_may_be_missing() -> None:
    methods, groups = planted(0, 0.2)
    tau = kendalltau(-worths(total(methods, groups)), range(len(methods))).statistic
    assert tau > 0.9


def test_the_order_of_runs_and_methods_does_not_matter() -> None:
    methods, groups = planted(1, 0.4)
    found = dict(zip(methods, worths(total(methods, groups)), strict=True))
    mixed, turned = methods[::-1], dict(reversed(groups.items()))
    again = dict(zip(mixed, worths(total(mixed, turned)), strict=True))
    assert {m: pytest.approx(v, abs=1e-6) for m, v in again.items()} == found


def test_methods_that_never_met_have_no_order() -> None:
    won = np.zeros((4, 4))
    won[0, 1] = won[2, 3] = won[1, 2] = 1
    assert pools(won) == [[0, 1, 2, 3]]
    won[1, 2] = 0
    assert pools(won) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="never met"):
        worths(won)


def test_the_run_that_decides_most_is_of_those_that_stand_close() -> None:
    """On g2 only the rest met; `x` lies between `a` and `b`, `far` lies far from all: x there decides more."""
    one = np.arange(20.0)
    first = {"a": one, "b": one + np.where(np.arange(20) % 2, 0.1, -0.1), "far": one + 9}
    first["x"] = one + np.where(np.arange(20) % 4 == 0, -0.05, 0.05)
    groups: dict[object, dict[str, np.ndarray]] = {"g1": first, "g2": {"a": one, "b": one + 0.1}}
    assert deciding(groups, ["a", "b", "far", "x"]) == ("x", "g2")
    groups["g2"] |= {"x": one, "far": one}
    assert deciding(groups, ["a", "b", "far", "x"]) is None
