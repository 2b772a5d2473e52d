"""Kinds of heads, after HACK (2504.09261): contextual ones, whose queries agree on what they read, and structural ones.

The paper tells them apart by the variance of each column of the attention map over the queries, low for contextual
(vertical stripes) and high for structural (diagonals), on 50 samples beforehand, and calls a share of all heads
contextual. Ours is that variance relative to the mean square, Σ_t Var_q(p_qt) / Σ_t E_q(p_qt²): 0 where all queries
read alike, 1 - 1/Q where no two read the same token. It is read from the newest queries while the model runs, and the
share is of the heads of each layer; or a rule names the kind of each head, as measured beforehand: `csc`.

Legend: B sequences, H KV heads, G query heads of one, Q queries, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.errors import BudgetError

CONTEXTUAL, STRUCTURAL = "c", "s"
SHARE = 0.5
"""Of a layer's heads, contextual."""


def variance_BH(p_BHGQT: Tensor) -> Tensor:
    """Column-wise variance over queries relative to the mean square, 0 to 1, the mean of a KV head's query heads."""
    square_BHG = p_BHGQT.square().mean(3).sum(-1)
    return ((square_BHG - p_BHGQT.mean(3).square().sum(-1)) / square_BHG.clamp_min(1e-30)).mean(-1)


def contextual_BH(p_BHGQT: Tensor, share: float = SHARE) -> Tensor:
    """Which KV heads are contextual, bool: the share of each layer's whose variance is lowest."""
    return lowest(variance_BH(p_BHGQT), share)


def lowest(variance: Tensor, share: float) -> Tensor:
    """Which are among the lowest share along the last axis, bool."""
    return variance.argsort(-1).argsort(-1) < round(share * variance.shape[-1])


def named_BH(kinds: str, p_BHGQT: Tensor) -> Tensor:
    """The same where a rule names the kinds: a letter a KV head.

    Raises:
        BudgetError: it names more heads or fewer.
    """
    batch, heads = p_BHGQT.shape[:2]
    if len(kinds) != heads:
        raise BudgetError(f"kinds names {len(kinds)} heads, {kinds!r}, and a block here has {heads}")
    is_H = torch.tensor([kind == CONTEXTUAL for kind in kinds], dtype=torch.bool, device=p_BHGQT.device)
    return is_H.expand(batch, -1)


def check_kinds(kinds: str) -> None:
    """
    Raises:
        ValueError: they are not of contextual and structural heads.
    """
    if set(kinds) - {CONTEXTUAL, STRUCTURAL}:
        raise ValueError(f"kinds has a letter a head, c for contextual and s for structural; you wrote {kinds!r}")
