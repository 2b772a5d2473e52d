"""What each option of a block's store would cost in KL, from the same backward pass as the weights'.

Reading codes moves what attention gives at every token from a to a + Δa, and KL ≈ ½ E[(Σ g Δa)²], g = ∂ log p / ∂ a, as
`fisher` has it for matrices. Attention alone is computed again, on some windows of one batch, for keys and for values
by themselves, at 4 and at 2 bits of each format; what both lose together is the sum, for their errors have little to do
with each other; 3 bits lie between on the logarithm, and 8 follow from 4 by the squares of their steps. Rude, and put
right by true KL of some, as the figures of weights are.

Cost: a dozen times a block's attention on a thousand tokens. Lower = better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regauge.cache.scheme import Scheme
from regauge.hosts.base import Runner
from regauge.hosts.heads import Heads
from regauge.plan.keeping import bits_of
from regauge.search.options import SiteGroup
from regauge.search.stores import held, scheme_of

TOKENS = 1024
"""Of a batch that attention is computed on again, whole windows."""
TRIED = (4, 2)
TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Reads:
    """One block's attention on its way back.

    Attributes:
        groups: the choice of its store, or none.
        seen: what attention was given in the first batch, with what was added to its output, whose gradient counts.
    """

    groups: Sequence[SiteGroup]
    seen: list[tuple[Heads, Tensor]] = field(default_factory=list)

    def watching(self, runner: Runner) -> AbstractContextManager[None]:
        """While it lasts the first batch is seen."""
        return runner.attending(self._see) if self.groups and not self.seen else nullcontext()

    def _see(self, heads: Heads) -> Tensor:
        out_BTHE = heads.plain()
        nudge = torch.zeros_like(out_BTHE, requires_grad=True)
        self.seen.append((heads, nudge))
        return out_BTHE + nudge

    @torch.no_grad()
    def losses(self, gradients: Sequence[Tensor]) -> dict[str, dict[str, float]]:
        """Group → option → nats a token, by the gradients at what `seen` was added to."""
        found: dict[str, dict[str, float]] = {}
        for group in self.groups:
            (heads, _), gradient_BTHE = self.seen[0], gradients[0]
            rows = slice(0, max(1, TOKENS // gradient_BTHE.shape[1]))
            found[group.name] = losses_of(group, _some(heads, rows), gradient_BTHE[rows])
        return found


def losses_of(group: SiteGroup, heads: Heads, gradient_BTHE: Tensor) -> dict[str, float]:
    """Option → nats a token."""
    assert group.store is not None, "a store's choice"
    plain_BTHE, tried = heads.plain().float(), dict[object, float]()

    def lost(scheme: Scheme, side: int) -> float:
        at = (scheme.formats[side], scheme.hadamard, side)
        if at not in tried:
            moved_BTHE = held(heads, scheme, (side == 0, side == 1)).float() - plain_BTHE
            pull_n = (moved_BTHE * gradient_BTHE.float()).sum((-1, -2)).flatten()
            tried[at] = 0.5 * float(pull_n.double().square().mean())
        return tried[at]

    schemes = {
        (option.name.partition("-")[2], bits_of(option.choice)): scheme_of(option.choice, group.store.sizes)
        for option in group.options
        if option.choice is not None
    }
    found = {}
    for option in group.options:
        if option.choice is None:
            found[option.name] = 0.0
            continue
        how, bits = option.name.partition("-")[2], bits_of(option.choice)
        ends = [[lost(schemes[how, (one, one)], side) for one in TRIED] for side in (0, 1)]
        found[option.name] = sum(between(bits[side], *ends[side]) for side in (0, 1))
    return found


def between(bits: int, at_four: float, at_two: float) -> float:
    """The loss at some bits from those at 4 and 2: a line in the logarithm, and the square of the step beyond 4."""
    if bits >= 4:
        return at_four * (15.0 / float(2**bits - 1)) ** 2
    high, low = math.log(max(at_four, TINY)), math.log(max(at_two, TINY))
    return math.exp(low + (high - low) * (bits - 2) / 2)


def _some(heads: Heads, rows: slice) -> Heads:
    """Some sequences of what attention was given, as values alone."""
    mask = heads.mask if heads.mask is None or heads.mask.shape[0] == 1 else heads.mask[rows]
    q, k, v = (x[rows].detach() for x in (heads.queries_BHTD, heads.keys_BKSD, heads.values_BKSE))
    some = replace(heads, queries_BHTD=q, keys_BKSD=k, values_BKSE=v, mask=mask)
    return replace(some, plain=lambda: held(some, Scheme()))
