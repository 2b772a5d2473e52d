"""Rules of a cache that are measured on images which the model draws: which heads and layers need most of the past.

    rule = by_kinds(model, [0, 1, 2, 3], keep=0.5)      # heads told apart, as HACK (arXiv 2504.09261) has it
    rg.load(folder, cache=rule)

Legend: B batch, H heads, G 1, Q queries, T tokens, S scales of which something is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from regauge.cache.base import Seen, probabilities
from regauge.cache.budgets import Uniform
from regauge.cache.disposals import Drop
from regauge.cache.kinds import CONTEXTUAL, SHARE, STRUCTURAL, lowest, variance_BH
from regauge.cache.scheme import BlockCache, CachePlan, Policy

EVERY = 1 << 16
"""Queries: all of a scale."""
Rule = dict[str, object]
"""A recipe as a mapping."""


@dataclass(frozen=True, eq=False)
class Watched:
    """A score that keeps everything and notes how its block's heads attend.

    Attributes:
        variance_SH: how far queries differ in what they read, a row a scale (`cache/kinds.py`).
        before_S: the share of attention that falls on earlier scales.
    """

    variance_SH: list[Tensor] = field(default_factory=list)
    before_S: list[float] = field(default_factory=list)
    sinks: ClassVar[int] = 0
    queries: ClassVar[int] = EVERY
    accumulates: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    def __call__(self, seen: Seen) -> Tensor:
        p_BHGQT = probabilities(seen)
        new = seen.queries_BHGQD.shape[3]
        if p_BHGQT.shape[-1] > new:  # at the first scale there is nothing to choose from
            self.variance_SH.append(variance_BH(p_BHGQT).mean(0))
            self.before_S.append(float(p_BHGQT[..., :-new].sum(-1).mean()))
        return torch.zeros_like(seen.positions_BHT, dtype=torch.float32)


def by_kinds(
    model: Any, labels: Sequence[int], keep: float = 0.5, share: float = SHARE, contextual: float = 0.5
) -> Rule:
    """HACK's rule: heads of the whole model told apart beforehand, little for contextual ones, each kind by its own
    score, the first two scales kept by all. Its sample is what the model draws of `labels`.

    Args:
        keep: the share of the tokens so far that the mean head keeps. share: of all heads, contextual.
        contextual: what such a head keeps, of an even budget.
    """
    found = watch(model, labels)
    variance_LH = torch.stack([torch.stack(one.variance_SH).mean(0) for one in found])
    is_LH = lowest(variance_LH.flatten(), share).view_as(variance_LH).tolist()
    structural = (1 - share * contextual) / (1 - share) if share < 1 else contextual
    weights = " ".join("/".join(f"{contextual if one else structural:g}" for one in row) for row in is_LH)
    first = sum(model.config.areas[:2])
    rules = {
        f"blocks.{block}.cache": {
            "score": {
                "part": "head-kinds",
                "sinks": first,
                "kinds": "".join(CONTEXTUAL if one else STRUCTURAL for one in row),
            },
            "budget": {"part": "sensitivity", "keep": keep, "weights": weights},
            "disposal": "drop",
        }
        for block, row in enumerate(is_LH)
    }
    return {"name": f"heads by kind, {keep:g}", "cache": rules}


def by_layers(model: Any, labels: Sequence[int], keep: float = 0.5) -> Rule:
    """ScaleKV's kind (arXiv 2505.19602): layers that attend to many scales keep much, those that attend to the map
    being drawn little; here in proportion to the attention that falls on earlier scales. Tokens by what queries spread
    over the newest map read."""
    weights = " ".join(f"{sum(one.before_S) / len(one.before_S):.3g}" for one in watch(model, labels))
    rule = {
        "score": {"part": "window-attention", "queries": 16, "pool": 1},
        "budget": {"part": "sensitivity", "keep": keep, "weights": weights},
        "disposal": "drop",
    }
    return {"name": f"layers by their past, {keep:g}", "cache": {"*": rule}}


def watch(model: Any, labels: Sequence[int], seed: int = 0) -> list[Watched]:
    """How each block attends while images are drawn."""
    found = [Watched() for _ in model.blocks]
    plan = CachePlan("watched", tuple(BlockCache(policy=Policy(one, Uniform(1.0), Drop())) for one in found))
    model.sample(labels, seed, model.taste(), None, plan)
    return found
