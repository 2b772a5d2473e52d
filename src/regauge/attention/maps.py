"""What attention probabilities show: how alike two blocks attend, and how far back heads look.

Legend: B sequences, H query heads, K KV heads, Q queries, T keys; queries are the last Q of the T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlap(p_BHQT: Tensor, q_BHQT: Tensor) -> float:
    """Σ min(p, q) over the keys, the mean over queries and heads: 1 where maps are equal, 0 where they share no key.

    It is 1 less their total variation, which bounds what taking one for the other changes in a head's output. The
    measure of EchoAtt itself (2409.14595) was not read.
    """
    return float(torch.minimum(p_BHQT, q_BHQT).sum(-1, dtype=torch.float64).mean())


def distances(p_BHQT: Tensor, kv_heads: int, sinks: int = 0) -> Tensor:
    """distance_K, float64: Σ p · (tokens back), the mean over queries and the query heads of each KV head.

    Args:
        sinks: the first tokens of the text that count as no distance, for many heads rest on them when they look
            for nothing.
    """
    queries, keys = p_BHQT.shape[-2:]
    own_Q = keys - queries + torch.arange(queries, dtype=torch.float64, device=p_BHQT.device)
    back_QT = own_Q[:, None] - torch.arange(keys, dtype=torch.float64, device=p_BHQT.device)
    back_QT[:, :sinks] = 0
    far_H = torch.einsum("bhqt,qt->h", p_BHQT.double(), back_QT) / (p_BHQT.shape[0] * queries)
    return far_H.view(kv_heads, -1).mean(1)


def probabilities(
    query_BHQD: Tensor,
    key_BKTD: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """p_BHQT, in the dtype of the queries: a softmax in float32 of what the mask leaves, as transformers' own eager
    attention computes it.

    Args:
        mask: bool (True: is seen) or added to the products, (B or 1, H or 1, Q, T or more: the first T count); None:
            causal.
        sinks_H: a product of each head that takes its share of the probability, and stands for no token.
    """
    queries, keys = query_BHQD.shape[2], key_BKTD.shape[2]
    heads = query_BHQD.shape[1] // key_BKTD.shape[1]
    key_BHTD = key_BKTD if heads == 1 else key_BKTD.repeat_interleave(heads, 1)
    weight_BHQT = query_BHQD @ key_BHTD.mT * scale
    if softcap:
        weight_BHQT = (weight_BHQT / softcap).tanh() * softcap
    if mask is None:
        mask = causal(queries, keys, query_BHQD.device)
    if mask.dtype == torch.bool:
        weight_BHQT = weight_BHQT.masked_fill(~mask[..., :keys], torch.finfo(weight_BHQT.dtype).min)
    else:
        weight_BHQT = weight_BHQT + mask[..., :keys]
    weight_BHQT = weight_BHQT.float()
    if sinks_H is not None:
        sinks_BHQ1 = sinks_H.float().view(1, -1, 1, 1).expand(*weight_BHQT.shape[:3], 1)
        weight_BHQT = torch.cat((weight_BHQT, sinks_BHQ1), -1)
    return weight_BHQT.softmax(-1)[..., :keys].to(query_BHQD.dtype)


def shown(mask: Tensor) -> Tensor:
    """Bool: what a mask shows, be it one of truths or one that is added to products."""
    return mask if mask.dtype == torch.bool else mask == 0


def first_seen(mask: Tensor) -> Tensor:
    """(B,), int64: the first token that each sequence's last query sees, behind the padding.

    Args:
        mask: (B, 1, Q, T), bool or added to products.
    """
    return shown(mask)[:, 0, -1].long().argmax(-1)


def causal(queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
    """seen_QT, bool: queries are the last of the keys, and each sees itself and what comes before."""
    own_Q = keys - queries + torch.arange(queries, dtype=torch.int64, device=device)
    return torch.arange(keys, dtype=torch.int64, device=device) <= own_Q[:, None]
