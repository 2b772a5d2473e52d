"""Bootstrap over documents: how far a figure could move had other documents been drawn.

Tokens of one document are not independent, so whole documents are drawn with replacement (Efron 1979; the cluster
bootstrap). Intervals are percentile intervals. Legend: N tokens, D documents, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 1000
LEVEL = 0.95
FEW = 10
"""Documents below which windows are drawn in their place; windows below which no interval is told."""


class Interval(BaseModel):
    """A figure and where 95% of resamples put it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Draws:
    """How often each document was drawn: counts_RD."""

    counts_RD: Floats

    @staticmethod
    def make(documents: int, seed: int = 0, resamples: int = RESAMPLES) -> Draws:
        generator = np.random.default_rng(seed)
        picks_RD = generator.integers(0, documents, size=(resamples, documents))
        counts_RD = np.zeros((resamples, documents))
        np.add.at(counts_RD, (np.arange(resamples)[:, None], picks_RD), 1.0)
        return Draws(counts_RD)


def interval(value: float, drawn_R: Floats) -> Interval:
    low, high = np.quantile(drawn_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=float(value), low=float(low), high=float(high))


def per_document(value_N: Floats, document_N: Ints, documents: int) -> Floats:
    """Sum over the tokens of each document."""
    return np.bincount(document_N, weights=value_N, minlength=documents).astype(np.float64)


def ratio(top_D: Floats, bottom_D: Floats, draws: Draws) -> Interval:
    """Σ top / Σ bottom over the documents drawn."""
    drawn_R = (draws.counts_RD @ top_D) / np.maximum(draws.counts_RD @ bottom_D, 1e-300)
    return interval(float(top_D.sum() / bottom_D.sum()), drawn_R)


def quantile(value_N: Floats, document_N: Ints, level: float, draws: Draws) -> Interval:
    """A quantile over tokens: the least value with at least `level` of the drawn tokens at or below it.

    Tokens are sorted once; a resample only changes their weights, so its quantile is one cumulative sum.
    """
    order = np.argsort(value_N, kind="stable")
    sorted_N, owner_N = value_N[order], document_N[order]

    def at(weight_D: Floats) -> float:
        running_N = np.cumsum(weight_D[owner_N])
        place = int(np.searchsorted(running_N, level * running_N[-1] * (1 - 1e-12)))
        return float(sorted_N[min(place, len(sorted_N) - 1)])

    drawn_R = np.array([at(weight_D) for weight_D in draws.counts_RD])
    return interval(at(np.ones(draws.counts_RD.shape[1])), drawn_R)
