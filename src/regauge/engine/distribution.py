"""Distribution correction: a block held to how it is to be distributed, not to how far off it is alone.

ABQ-LLM (2408.08554) trains a block by −log cos beside the squared error, each against the uncompressed model's output
and against what the uncompressed block makes of the compressed model's states, and by the Kullback-Leibler divergence
of its attention maps, in both directions, from those of the uncompressed block.

Legend: B sequences, H query heads, T tokens, S tokens looked at, D hidden, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.errors import RecipeError
from regauge.hosts.heads import Attend, Heads

Bound = Callable[[Tensor, int], Tensor]
Kept = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Correction:
    """What is added to a block's error.

    Attributes:
        exact: the uncompressed block, as a function of states and the number of the batch.
        attending: has attention computed by whom it is given, while it lasts.
    """

    exact: Bound
    attending: Callable[[Attend], AbstractContextManager[None]]

    def seen(self, run: Bound, x_BTD: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """What a block gives, and the logarithms of its attention map (B, H, T, S).

        Raises:
            RecipeError: the family's attention cannot be seen, or does more than a map says.
        """
        maps: list[Tensor] = []

        def look(heads: Heads) -> Tensor:
            if not heads.beyond:
                maps.append(log_map(heads))
            return heads.plain()

        with self.attending(look):
            y_BTD = run(x_BTD, batch)
        if len(maps) != 1:
            raise RecipeError(
                "loss 'distribution' compares attention maps, and this model's attention shows none; leave it out"
            )
        return y_BTD, maps[0]

    def __call__(self, run: Bound, x_BTD: Tensor, batch: int, target_BTD: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """(what the block gives, the loss of one batch without its squared error against the target).

        Args:
            kept: takes the tokens that count, (N, D), of states (B, T, D).
        """
        with torch.no_grad():
            own_BTD, want = self.seen(self.exact, x_BTD, batch)
        y_BTD, found = self.seen(run, x_BTD, batch)
        y_ND, own_ND, target_ND = (kept(one.float()) for one in (y_BTD, own_BTD, target_BTD))
        again = (y_ND - own_ND).square().sum() / own_ND.square().sum().clamp_min(1e-30)
        return y_BTD, again + off(y_ND, target_ND) + off(y_ND, own_ND) + apart(found, want)


def off(y_ND: Tensor, target_ND: Tensor) -> Tensor:
    """−log cos of each token's state to its target, averaged; 0 where they point the same way."""
    cosine_N = torch.nn.functional.cosine_similarity(y_ND, target_ND, dim=-1)
    return -cosine_N.clamp_min(1e-6).log().mean()


def apart(found: Tensor, want: Tensor) -> Tensor:
    """KL of two attention maps, given by their logarithms, in both directions, averaged over heads and queries."""
    gap = want - found
    each = (want.exp() - found.exp()) * torch.where(gap.isfinite(), gap, 0.0)
    return each.sum(-1).mean()


def log_map(heads: Heads) -> Tensor:
    """log softmax of a block's scores, (B, H, T, S), float32; −inf where a query does not see."""
    q_BHTD, k_BKSD = heads.queries_BHTD.float(), heads.keys_BKSD.float()
    k_BHSD = k_BKSD.repeat_interleave(q_BHTD.shape[1] // k_BKSD.shape[1], 1)
    score_BHTS = q_BHTD @ k_BHSD.transpose(-1, -2) * heads.scale
    mask = heads.mask
    if mask is None:
        queries, keys = score_BHTS.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=score_BHTS.device).tril(keys - queries)
    if mask.dtype is torch.bool:
        return score_BHTS.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return (score_BHTS + mask).log_softmax(-1)
