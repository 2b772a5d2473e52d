"""Tokens and channels of a block brought to one spread before they are rounded (KVarN, arXiv 2606.03458).

A token of unusual size widens the steps of every channel of its group. Dividing channels and tokens by their spread in
turn (Sinkhorn's iteration) finds one number a token, which is kept beside the codes; what it finds for a channel need
not be kept where steps are a channel's own, for they take it in: value = token's · (step · code + low).
Differs from KVarN: which round is the least uneven is told by the tokens' spread alone, since a channel's is its own
step's; values are rounded by channel too, where KVarN rounds them by token and keeps a number a channel.

Legend: N blocks, T tokens of a block, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST, MOST = 1e-3, 1e3
"""A spread is held between these, as in KVarN's code: a token of zeros stays one."""


def token_spreads(x_NTD: Tensor, rounds: int) -> Tensor:
    """(N, T), float32, positive: what each token is divided by.

    Args:
        rounds: how often channels and tokens are divided in turn; the round that leaves tokens the most alike is taken,
            none where they are so already.
    """
    y_NTD = x_NTD.double()  # so that what is kept does not hang on how many blocks are summed at once
    found_NT = torch.ones_like(y_NTD[..., 0])
    best_NT, least_N1 = found_NT, _uneven(y_NTD / _spread(y_NTD, 1))
    for _ in range(rounds):
        y_NTD = y_NTD / _spread(y_NTD, 1)
        token_NT1 = _spread(y_NTD, 2)
        y_NTD = y_NTD / token_NT1
        found_NT = found_NT * token_NT1[..., 0]
        uneven_N1 = _uneven(y_NTD / _spread(y_NTD, 1))
        best_NT = torch.where(uneven_N1 < least_N1, found_NT, best_NT)
        least_N1 = torch.minimum(uneven_N1, least_N1)
    return best_NT.float()


def _spread(y_NTD: Tensor, axis: int) -> Tensor:
    return y_NTD.square().mean(axis, keepdim=True).sqrt().clamp(LEAST, MOST)


def _uneven(y_NTD: Tensor) -> Tensor:
    """The largest spread of a token over the least (N, 1)."""
    spread_NT = _spread(y_NTD, 2)[..., 0]
    return spread_NT.amax(1, keepdim=True) / spread_NT.amin(1, keepdim=True)
