"""By what the streams of a family are sorted, so that the first units are the best part to keep.

An order is the name of the rewrite that sorts: exact moves, certified like any other. `none` leaves channels as they
lie, which is the null that every order must beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ORDERS: Mapping[str, str] = {"activation": "permute", "none": ""}
"""Order → the rewrite that sorts by it; "": nothing is sorted."""
SORTED = {"ffn": "ffn", "heads": "heads", "width": "residual"}
"""Dimension → the kind of stream that is sorted for it."""


def influence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How much a block turns the states that go through it: 1 − the mean cosine of a token's states around it.

    0: it could be left out and no direction would change. Reference: block influence, ShortGPT (2403.03853).

    Args:
        before, after: (B, T, H), a batch each.
    """
    total, tokens = 0.0, 0
    for a_BTH, b_BTH in zip(before, after, strict=True):
        cosine = torch.cosine_similarity(a_BTH.float(), b_BTH.float(), dim=-1)
        total, tokens = total + float(cosine.double().sum()), tokens + cosine.numel()
    return 1 - total / max(tokens, 1)


def ranked(influences: Sequence[float]) -> tuple[int, ...]:
    """Every block, the most important first; of equals the earlier."""
    return tuple(sorted(range(len(influences)), key=lambda block: (-influences[block], block)))
