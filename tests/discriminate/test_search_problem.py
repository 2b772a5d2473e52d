"""Measuring beats predicting: where predictions are wrong, `sharpen` and `refine` find what true KL says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.hosts.transformers.source import Source
from regauge.search.allocation import Bound, allocate
from regauge.search.kept import Folder
from regauge.search.loop import problem as module
from regauge.search.loop.problem import Problem, key, read_ledger
from regauge.search.losses.shelf import Shelf
from regauge.search.losses.trials import Picks
from regauge.search.options import site_groups
from regauge.search.subject import Subject
from regauge.text.windows import Windows
from tests.pico import pico, save

WIDE = {"hidden_size": 96, "intermediate_size": 70, "vocab_size": 61}


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    """All groups predicted alike: 4^−bits."""
    subject = Subject.of(Source.open(save(pico("llama", 0, **WIDE), tmp_path / "model")))
    groups = site_groups(subject.anatomy)
    predicted = {g.name: {o.name: 0.0 if o.choice is None else 4.0**-o.bits for o in g.options} for g in groups}
    text = Windows((torch.tensor([1, 2, 3]),), (0,), (2,))
    return Problem(subject, Shelf(tmp_path, groups), text, predicted, 100.0, Folder(tmp_path))


def truth(problem: Problem, weight: dict[str, float], seen: list[str]) -> Any:
    """True KL by a formula that the search does not know: a weight a group."""

    def true_kl(_: Subject, __: Shelf, ___: Windows, variants: Sequence[Picks], tokens: int = 0) -> list[float]:
        seen.extend(key(picks) for picks in variants)
        return [
            sum(weight.get(name, 1.0) * 4.0**-o.bits for name, o in picks.items() if o.choice is not None)
            for picks in variants
        ]

    return true_kl


def test_sharpen_finds_the_sensitive_group(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = problem.groups[3].name
    monkeypatch.setattr(module, "true_kl", truth(problem, {hot: 100.0}, []))
    even = problem.uniform("int3-g32")
    assert even is not None
    bound = Bound("bytes", problem.size(even), problem.fixed)
    blind = problem.picks(allocate(problem.candidates(), [bound]))
    found = problem.picks(problem.sharpen([bound], most=40))
    assert found[hot].bits >= blind[hot].bits + 2
    after, before, flat = problem.measure([found, blind, even])
    assert after < 0.5 * before
    assert after < 0.5 * flat
    assert problem.size(found) <= bound.limit
    told = problem.check()
    assert told is not None
    assert told.scale == pytest.approx(1.0)  # the median: one group of many is off


def test_what_weighs_most_is_measured_first(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = problem.groups[4]
    seen: list[str] = []
    problem.predicted[hot.name].update({option.name: 4.0 for option in hot.options if option.choice is not None})
    cheap = Bound("bytes", problem.size({g.name: g.options[0] for g in problem.groups}), problem.fixed)
    monkeypatch.setattr(module, "true_kl", truth(problem, {}, seen))
    problem.sharpen([cheap], most=1)
    assert len(seen) == 1
    assert seen[0] in {key({hot.name: option}) for option in hot.options}


def test_refine_takes_the_best_of_what_it_measured(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {group.name: 1.0 + 0.3 * (place % 3) for place, group in enumerate(problem.groups)}
    seen: list[str] = []
    monkeypatch.setattr(module, "true_kl", truth(problem, weights, seen))
    even = problem.uniform("int4-g32")
    assert even is not None
    bound = Bound("bytes", problem.size(even), problem.fixed)
    start = allocate(problem.candidates(), [bound])
    best = problem.refine(start, [bound], count=12, rounds=2, seed=0)
    assert problem.size(problem.picks(best)) <= bound.limit
    assert problem.measure([problem.picks(best)])[0] == min(problem.ledger.values())
    assert problem.measure([problem.picks(best)])[0] < problem.measure([problem.picks(start)])[0]


def test_nothing_is_measured_twice(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(module, "true_kl", truth(problem, {}, seen))
    group = problem.groups[0]
    variants: list[Picks] = [{group.name: option} for option in group.options[:3]]
    first = problem.measure(variants)
    assert problem.measure([*variants, variants[0]]) == [*first, first[0]]
    assert len(seen) == 3
    assert read_ledger(problem.folder) == problem.ledger
    (problem.folder.path / "ledger.json").write_text("{half")
    assert read_ledger(problem.folder) == {}


def test_what_an_earlier_run_measured_decides_nothing_before_it_is_asked_for(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on takes the way of one that was left alone, and measures nothing again on it."""
    seen: list[str] = []
    hot = problem.groups[3].name
    monkeypatch.setattr(module, "true_kl", truth(problem, {hot: 100.0}, seen))
    even = problem.uniform("int3-g32")
    assert even is not None
    bound = Bound("bytes", problem.size(even), problem.fixed)
    alone = problem.sharpen([bound], most=40)
    measured, later = len(seen), replace(problem, ledger={}, kept=read_ledger(problem.folder))
    assert later.losses() != problem.losses()
    assert later.sharpen([bound], most=40) == alone
    assert later.losses() == problem.losses()
    assert len(seen) == measured
