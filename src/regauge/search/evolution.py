"""Evolutionary search with a predictor: many candidates are guessed, few are measured.

Whatever has genes can be searched: a candidate is a tuple of choices, a place each. A ridge regression over choices,
fitted to what was measured, predicts the logarithm of the loss; a population evolves by it (mutation,
crossover, the best stay), the most promising are measured, and the regression is fitted anew. What is returned was
measured, never only predicted.

Reference: the second half of Once-for-All (1908.09791), whose predictor is a network of accuracy and whose latency is a
table; here tens of measured members are the data, so the regression is linear.

Legend: N candidates that were measured, P places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

Genes = tuple[int, ...]
"""The choice at each place, 0: the whole; higher is smaller."""
Floats = NDArray[np.float64]
LEAST = 1e-9
"""Losses below this are as good as none."""
RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Strengths of the regression that are tried; the best on what was left out is taken."""


ATTEMPTS = 4
"""To make a candidate fit."""


def _at(genes: Genes, place: int, pick: int) -> Genes:
    return (*genes[:place], pick, *genes[place + 1 :])


@dataclass(frozen=True)
class Space:
    """What may be chosen.

    Attributes:
        choices: how many there are at each place.
        cost: of a candidate, in the unit of the limit; growing a place never makes it smaller.
        legal: whether there is such a candidate at all.
    """

    choices: tuple[int, ...]
    cost: Callable[[Genes], float]
    legal: Callable[[Genes], bool]

    def fitted(self, genes: Genes, limit: float, rng: np.random.Generator) -> Genes | None:
        """A legal candidate within a limit near to this one, with nothing to spare: places shrink at random until it
        fits, then grow at random while it does. None where that ends nowhere."""
        steps = 2 * sum(self.choices)
        for _ in range(ATTEMPTS):
            now: Genes | None = genes
            for _ in range(steps):
                if now is None:
                    break
                if self.legal(now) and self.cost(now) <= limit:
                    return self._grown(now, limit, rng)
                now = self._changed(now, rng)
        return None

    def _changed(self, now: Genes, rng: np.random.Generator) -> Genes | None:
        """One place smaller; of a candidate that is not legal, a place whole again where that makes it so. Half of the
        time any place, so that what is not legal is gone through where it lies between."""
        was, first = self.legal(now), None
        for place in rng.permutation(len(now)):
            tried = [_at(now, int(place), now[place] + 1)] if now[place] < self.choices[place] - 1 else []
            tried += [] if was or not now[place] else [_at(now, int(place), 0)]
            for one in tried:
                if self.legal(one) or (was and rng.random() < 0.5):
                    return one
                first = first or one
        return first

    def _grown(self, now: Genes, limit: float, rng: np.random.Generator) -> Genes:
        for place in rng.permutation(len(now)):
            for smaller in range(now[place]):
                tried = _at(now, int(place), smaller)
                if self.legal(tried) and self.cost(tried) <= limit:
                    now = tried
                    break
        return now

    def drawn(self, limit: float, rng: np.random.Generator) -> Genes | None:
        """A candidate at random, as large as fits."""
        genes = tuple(int(rng.integers(count)) if rng.random() < 0.5 else 0 for count in self.choices)
        return self.fitted(genes, limit, rng)


@dataclass
class Measured:
    """What was measured so far.

    Attributes:
        losses: candidate → its loss.
        measure: measures one that was not.
    """

    measure: Callable[[Genes], float]
    losses: dict[Genes, float] = field(default_factory=dict)

    def __call__(self, genes: Genes) -> float:
        if genes not in self.losses:
            self.losses[genes] = self.measure(genes)
        return self.losses[genes]

    def best(self, space: Space, limit: float) -> Genes | None:
        """The best that was measured within a limit."""
        fits = [genes for genes in self.losses if space.legal(genes) and space.cost(genes) <= limit]
        return min(fits, key=lambda genes: (self.losses[genes], genes)) if fits else None


class Predictor:
    """Ridge regression of the logarithm of a loss on how far each place is from whole, and on their mean, squared."""

    def __init__(self, choices: Sequence[int], losses: Mapping[Genes, float]) -> None:
        self.choices = tuple(choices)
        x_NP = self._seen(list(losses))
        y_N = np.log(np.maximum(np.array(list(losses.values()), dtype=np.float64), LEAST))
        self.mean_P, self.mean = x_NP.mean(0), float(y_N.mean())
        centred_NP, target_N = x_NP - self.mean_P, y_N - self.mean
        u_NK, s_K, v_KP = np.linalg.svd(centred_NP, full_matrices=False)
        fits: list[tuple[float, Floats]] = []
        for ridge in RIDGES:
            shrink_K = s_K**2 / (s_K**2 + ridge)
            rest_N = target_N - u_NK @ (shrink_K * (u_NK.T @ target_N))
            left_N = 1 - (u_NK**2) @ shrink_K - 1 / len(y_N)
            away = float(np.mean((rest_N / np.maximum(left_N, 1e-6)) ** 2))  # each predicted by the others
            fits.append((away, v_KP.T @ (s_K / (s_K**2 + ridge) * (u_NK.T @ target_N))))
        self.error, self.weights_P = min(fits, key=lambda fit: fit[0])
        self.error **= 0.5

    def __call__(self, several: Sequence[Genes]) -> Floats:
        found: Floats = (self._seen(several) - self.mean_P) @ self.weights_P + self.mean
        return found

    def _seen(self, several: Sequence[Genes]) -> Floats:
        open_ = np.array([count > 1 for count in self.choices])
        most_P = np.array(self.choices, dtype=np.float64)[open_] - 1
        smaller_NP: Floats = np.array(several, dtype=np.float64)[:, open_] / most_P
        return np.concatenate([smaller_NP, smaller_NP.mean(1, keepdims=True) ** 2], 1)


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        evaluations: candidates that are measured at the most.
        first: of them before anything is predicted.
        rounds: times that the predictor is fitted anew.
        population, generations: of each of them.
    """

    evaluations: int = 48
    first: int = 20
    rounds: int = 4
    population: int = 64
    generations: int = 12


def evolved(
    space: Space, limit: float, measured: Measured, starts: Sequence[Genes], effort: Effort, seed: int
) -> Genes | None:
    """The best candidate within a limit that was found and measured; None where nothing fits.

    Args:
        starts: candidates to begin with, such as those that choose the same everywhere.
    """
    rng, spent = np.random.default_rng(seed), 0

    def tell(several: Sequence[Genes], most: int) -> int:
        new = [genes for genes in dict.fromkeys(several) if genes not in measured.losses][:most]
        for genes in new:
            measured(genes)
        return len(new)

    fitting = [genes for genes in starts if space.legal(genes) and space.cost(genes) <= limit]
    fitting.sort(key=lambda genes: (-space.cost(genes), genes))  # what is near to the limit has most to keep
    fitting = list({space.cost(genes): genes for genes in reversed(fitting)}.values())[::-1]  # of as costly the wholest
    drawn = [genes for _ in range(2 * effort.first) if (genes := space.drawn(limit, rng)) is not None]
    if not drawn:
        return measured.best(space, limit)
    first = min(effort.first, effort.evaluations)
    spent += tell(fitting, first // 2)
    spent += tell(drawn, first - spent)
    for left in range(effort.rounds, 0, -1):
        predictor = Predictor(space.choices, measured.losses)
        found = _generations(space, limit, measured, predictor, effort, rng)
        spent += tell(found, (effort.evaluations - spent) // left)
    return measured.best(space, limit)


def _generations(
    space: Space,
    limit: float,
    measured: Measured,
    predictor: Predictor,
    effort: Effort,
    rng: np.random.Generator,
) -> list[Genes]:
    """Candidates that were not measured, by predicted loss, the best first; in turn one from anywhere and one near to
    the best that was measured, so that what the regression has wrong is soon seen."""
    known = sorted(
        (genes for genes in measured.losses if space.legal(genes) and space.cost(genes) <= limit),
        key=lambda genes: measured.losses[genes],
    )[: effort.population // 4]
    people = list(known)
    for _ in range(4 * effort.population):
        if len(people) >= effort.population:
            break
        genes = space.drawn(limit, rng)
        if genes is not None:
            people.append(genes)
    for _ in range(effort.generations):
        people = _ranked(people, predictor)[: max(2, effort.population // 4)]
        parents = list(people)
        for _ in range(effort.population):
            child = _child(space, parents, limit, rng)
            if child is not None:
                people.append(child)
    far = _ranked(people, predictor)
    if not known:
        return far
    near = [_child(space, known[:1], limit, rng) for _ in range(effort.population)]
    close = _ranked([one for one in near if one is not None and one not in measured.losses], predictor)
    far = [one for one in far if one not in measured.losses]
    return [one for pair in zip_longest(far, close) for one in pair if one is not None]


def _child(space: Space, parents: Sequence[Genes], limit: float, rng: np.random.Generator) -> Genes | None:
    """Two parents crossed place by place, or one alone; a place or two chosen anew; as large as fits."""
    one, other = (parents[int(rng.integers(len(parents)))] for _ in range(2))
    mixed = rng.random() < 0.5
    genes = [b if mixed and rng.random() < 0.5 else a for a, b in zip(one, other, strict=True)]
    for place in rng.choice(len(genes), size=min(len(genes), 1 + int(rng.integers(2))), replace=False):
        genes[place] = int(rng.integers(space.choices[place]))
    return space.fitted(tuple(genes), limit, rng)


def _ranked(people: Sequence[Genes], predictor: Predictor) -> list[Genes]:
    several = list(dict.fromkeys(people))
    if not several:
        return []
    return [several[index] for index in np.argsort(predictor(several), kind="stable")]
