"""The evolutionary search on a toy whose losses are known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from regauge.search.evolution import Effort, Genes, Measured, Predictor, Space, evolved

PLACES, CHOICES = 16, 3
WEIGHTS = np.random.default_rng(7).lognormal(0, 1.5, PLACES)
"""How much each place matters: a few for much, most for little."""
LIMIT = 2.0 * PLACES / 2
EFFORT = Effort(evaluations=64, first=32, rounds=4, population=32, generations=6)


def loss(genes: Genes) -> float:
    """What is lost multiplies, as it does in models; two neighbours that both shrink cost more."""
    lost = sum(w * g for w, g in zip(WEIGHTS, genes, strict=True))
    return 0.01 * math.exp(0.2 * lost + 0.05 * sum(a * b for a, b in pairwise(genes)))


def space() -> Space:
    return Space((CHOICES,) * PLACES, lambda genes: float(sum(2 - g for g in genes)), lambda genes: genes[0] < 2)


def alike() -> list[Genes]:
    return [(0,) + (pick,) * (PLACES - 1) for pick in range(CHOICES)]


@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_the_same_everywhere_and_as_many_at_random(seed: int) -> None:
    some, measured = space(), Measured(loss)
    best = evolved(some, LIMIT, measured, alike(), EFFORT, seed)
    assert best is not None
    assert len(measured.losses) <= EFFORT.evaluations
    assert some.cost(best) <= LIMIT
    assert some.legal(best)
    rng = np.random.default_rng(seed)
    drawn = [some.drawn(LIMIT, rng) for _ in range(EFFORT.evaluations)]
    assert loss(best) < 0.8 * min(loss(genes) for genes in drawn if genes is not None)
    assert loss(best) < 0.8 * min(loss(genes) for genes in alike() if some.cost(genes) <= LIMIT)


def test_of_starts_that_cost_the_same_the_wholest_is_measured() -> None:
    """A place that spares nothing (experts, of bytes) is not worth the measurements that a start takes."""
    free = Space((2, 3), lambda genes: 2.0 - genes[0], lambda genes: True)
    measured = Measured(lambda genes: 1.0 + sum(genes))
    starts = [(0, 2), (0, 1), (0, 0), (1, 2), (1, 1), (1, 0)]
    evolved(free, 2.0, measured, starts, Effort(evaluations=4, first=4, rounds=0), 0)
    assert set(measured.losses) == {(0, 0), (1, 0)}


def test_without_its_predictor_it_is_no_better_than_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictor is what finds: where it knows nothing, as many measurements find clearly less."""
    found = {}
    for blind in (False, True):
        if blind:
            draw = np.random.default_rng(3)
            monkeypatch.setattr(Predictor, "__call__", lambda _, several, draw=draw: draw.random(len(several)))
        measured = Measured(loss)
        bests = [evolved(space(), LIMIT, Measured(loss), alike(), EFFORT, seed) for seed in range(3)]
        found[blind] = sum(math.log(measured(genes)) for genes in bests if genes is not None)
    assert found[False] < found[True] - 0.5


def test_the_predictor_ranks_what_it_has_not_seen() -> None:
    rng = np.random.default_rng(0)
    drawn = [tuple(int(g) for g in rng.integers(0, CHOICES, PLACES)) for _ in range(120)]
    predictor = Predictor((CHOICES,) * PLACES, {genes: loss(genes) for genes in drawn[:80]})
    predicted, true = predictor(drawn[80:]), np.log([loss(genes) for genes in drawn[80:]])
    assert np.corrcoef(predicted, true)[0, 1] > 0.9
    assert predictor.error < 0.6 * float(np.std(true))


def test_nothing_fits() -> None:
    assert evolved(space(), -1.0, Measured(loss), alike(), EFFORT, 0) is None


def test_the_same_seed_finds_the_same() -> None:
    runs = [evolved(space(), LIMIT, Measured(loss), alike(), EFFORT, 5) for _ in range(2)]
    assert runs[0] == runs[1]
