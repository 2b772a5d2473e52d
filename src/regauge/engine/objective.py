"""The error of a block's output against the teacher's, under given formats: what a choice by block is made by.

Two streams of states meet here. What goes into the block is what the compressed model has made of the text so far; what
should come out is what the uncompressed model has made of it, in the compressed model's gauge, so that a block can make
good what those before it did. The teacher is the source under the plan's exact moves, in float32.

Legend: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from regauge.anatomy.model import Weights
from regauge.engine.distribution import Bound, Correction
from regauge.hosts.heads import Attend
from regauge.hosts.states import States

Change = Mapping[str, Callable[[Tensor], Tensor]]
TRIED = 8192  # tokens on which a plain call takes the error: a part calls it for every value that it tries
APART = 2048  # tokens on which it takes that of some sites: it is called for every value and every set of them


@dataclass(frozen=True, eq=False)
class Objective:
    """Σ (y − t)² / Σ t², y the block's output and t the teacher's, padding left out. 0 = the same; lower = better.

    As a plain call, `objective(weights)`, it takes tentative tensors of the block, rounds them as the plan's formats
    say (each weight to its nearest code, whatever the rounder) and gives the error on some of the text. With `sites` it
    is that of rounding these alone, on what the uncompressed model puts into the block. `miss` is the error on one
    batch, differentiable in the weights, for `learn/loop.py`.
    Cost: a call runs the block on at most `TRIED` tokens, or `APART` with `sites` (a batch at least), and rounds once.

    Attributes:
        states: the compressed model's, before the block.
        target: the teacher's, behind it.
        bind: the block under some weights, with some inputs of sites changed, as a function of states and batch number.
        rounded: tensors of the block, and the sites to round (None: all) → what the plan's formats leave of them.
        inputs: site → how its input is rounded by the plan.
        before: the teacher's states before the block.
        correction: what training adds to the error (`engine/distribution.py`); None for nothing.
    """

    states: States
    target: States
    bind: Callable[[Weights, Change], Bound]
    rounded: Callable[[Weights, Collection[str] | None], Weights]
    inputs: Change
    before: States | None = None
    correction: Correction | None = None

    def __call__(self, weights: Weights, sites: Collection[str] | None = None) -> float:
        most = TRIED if sites is None else APART
        few = max(1, most * self.batches // max(self.states.tokens, 1))
        step = max(1, -(-self.batches // few))
        given = self if sites is None or self.before is None else replace(self, states=self.before)
        with torch.no_grad():
            inputs = {site: change for site, change in self.inputs.items() if sites is None or site in sites}
            return given.over(self.bind(self.rounded(weights, sites), inputs), range(0, self.batches, step))

    def corrected(self, exact: Weights, attending: Callable[[Attend], AbstractContextManager[None]]) -> Objective:
        """The same with distribution correction against the uncompressed block's tensors."""
        return replace(self, correction=Correction(self.bind(exact, {}), attending))

    @property
    def batches(self) -> int:
        return len(self.states)

    def error(self, weights: Weights, inputs: Change | None = None) -> float:
        """The error over all the text of a block that computes with these tensors as they are."""
        with torch.no_grad():
            return self.over(self.bind(weights, self._changes(inputs)), range(self.batches))

    def miss(self, weights: Weights, batch: int, inputs: Change | None = None) -> Tensor:
        """The error on one batch, a scalar, as a share of the mean energy of all: its mean over batches of one size is
        `error`."""
        run, more = self.bind(weights, self._changes(inputs)), None
        if self.correction is not None:
            x_BTD, target_BTD = self.states.hidden[batch], self.target.hidden[batch]
            y_BTD, more = self.correction(run, x_BTD, batch, target_BTD, lambda one: self._kept(one, batch))
            run = lambda *_: y_BTD  # noqa: E731  # it was run already
        found = self._apart(run, batch)
        share = self._sizes[batch] / sum(self._sizes)
        found = found / (self._energy * share)
        return found if more is None else found + more

    def over(self, run: Bound, batches: range) -> float:
        above = sum(float(self._apart(run, batch)) for batch in batches)
        below = sum(self._energies[batch] for batch in batches)
        return above / below if below else 0.0

    def _changes(self, inputs: Change | None) -> Change:
        return self.inputs if not inputs else {**self.inputs, **inputs}

    def _apart(self, run: Bound, batch: int) -> Tensor:
        """Σ (y − t)² of one batch."""
        miss_BTD = run(self.states.hidden[batch], batch).float() - self.target.hidden[batch].float()
        return self._kept(miss_BTD, batch).square().sum()

    def _kept(self, x_BTD: Tensor, batch: int) -> Tensor:
        keep = self.states.keep(batch)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        return x_ND if keep is None or len(keep) != len(x_ND) else x_ND[keep]

    @cached_property
    def _energies(self) -> list[float]:
        return [
            float(self._kept(target_BTD.float(), batch).square().sum())
            for batch, target_BTD in enumerate(self.target.hidden)
        ]

    @cached_property
    def _energy(self) -> float:
        return sum(self._energies) or 1.0

    @cached_property
    def _sizes(self) -> list[int]:
        return [len(self._kept(target_BTD, batch)) for batch, target_BTD in enumerate(self.target.hidden)]
