"""How far products of rotated queries and keys depend on where a text begins, which in exact arithmetic they do not.

AnchorAttention (2411.13476) found that with bfloat16 products change when all positions are moved together, the more
the longer the text, and most at the first token. `drift` measures that as transformers rounds: angles in float32,
cosines and sines in the dtype of the model, and the turn itself in that dtype.

Legend: B sequences, H query heads, K KV heads, G query heads of one, T tokens, D head size, P pairs of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.anatomy.values import pair_slices
from regauge.attention.maps import causal


@dataclass(frozen=True)
class Turning:
    """How a model turns queries and keys.

    Attributes:
        radians_P: a position's, one number a pair of channels, float32.
        halves: pairs are (i, i + P), or else neighbours (2i, 2i + 1). Channels behind the last pair are not turned.
    """

    radians_P: Tensor
    halves: bool = True

    def __call__(self, x_BHTD: Tensor, positions_T: Tensor, dtype: torch.dtype) -> Tensor:
        """The same turned by each token's position, computed in `dtype`."""
        pairs = len(self.radians_P)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angle_TP = positions_T.to(wide)[:, None] * self.radians_P.to(wide)
        cos_TP, sin_TP = angle_TP.cos().to(dtype), angle_TP.sin().to(dtype)
        first, second = pair_slices(pairs, self.halves)
        out_BHTD = x_BHTD.to(dtype)
        a, b = out_BHTD[..., first], out_BHTD[..., second]
        turned_BHTD = out_BHTD.clone()
        turned_BHTD[..., first] = a * cos_TP - b * sin_TP
        turned_BHTD[..., second] = b * cos_TP + a * sin_TP
        return turned_BHTD


@dataclass(frozen=True)
class Drift:
    """What moving a text by `shift` positions changes in its products.

    Attributes:
        mean: |product − product after the move| over all queries, and keys at or before them.
        first: the same of the first key alone.
        wide: `mean` in float32.
        spread: standard deviation of the products themselves, what a change is to be held to.
    """

    shift: int
    mean: float
    first: float
    wide: float
    spread: float


def drift(query_BHTD: Tensor, key_BKTD: Tensor, turning: Turning, shift: int, scale: float) -> Drift:
    """How far products in bfloat16 drift from relative.

    Args:
        query_BHTD, key_BKTD: before they are turned, of tokens at positions 0 to T − 1.
        shift: how many positions the whole text is moved by.
        scale: what products are multiplied by.
    """
    tokens = query_BHTD.shape[2]
    seen_QT = causal(tokens, tokens, query_BHTD.device)

    def products(start: int, dtype: torch.dtype) -> Tensor:
        at_T = torch.arange(start, start + tokens, dtype=torch.int64, device=query_BHTD.device)
        query, key = (turning(x, at_T, dtype).float() for x in (query_BHTD, key_BKTD))
        return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale

    here_BHQT = products(0, torch.bfloat16)
    moved_BHQT = (products(shift, torch.bfloat16) - here_BHQT).abs()
    wide_BHQT = (products(shift, torch.float32) - products(0, torch.float32)).abs()
    return Drift(
        shift,
        mean=float(moved_BHQT[..., seen_QT].mean()),
        first=float(moved_BHQT[..., 0].mean()),
        wide=float(wide_BHQT[..., seen_QT].mean()),
        spread=float(here_BHQT[..., seen_QT].std()),
    )
