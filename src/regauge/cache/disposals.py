"""Disposals: what becomes of the tokens that a head does not keep.

Legend: O older tokens, K kept of them, E the others, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Drop:
    """They are gone, and their memory with them."""

    merges: ClassVar[bool] = False

    def __call__(self, keys_OD: Tensor, values_OD: Tensor, kept_O: Tensor) -> tuple[Tensor, Tensor]:
        return keys_OD[kept_O], values_OD[kept_O]


@dataclass(frozen=True)
class MergeKept:
    """Each goes into the kept token whose key is nearest in angle: D2O (2406.13035, eq. 6 to 9), merge and discard.

    A kept token weighs e, and what comes to it exp(cos) each, keys and values alike; what is less alike than `alike`
    to every kept token is discarded. The paper's threshold follows the mean of the likenesses as the text grows; ours
    is fixed. Keys are merged with their rotations, so those of near positions are the ones alike.

    Args:
        alike: the least cosine of what is merged, -1 to 1; 1: nothing is.
    """

    alike: float = 0.8
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not -1 <= self.alike <= 1:
            raise ValueError(f"alike is a cosine, -1 to 1; you wrote {self.alike:g}")

    def __call__(self, keys_OD: Tensor, values_OD: Tensor, kept_O: Tensor) -> tuple[Tensor, Tensor]:
        keys_KD, values_KD = keys_OD[kept_O].float(), values_OD[kept_O].float()
        keys_ED, values_ED = keys_OD[~kept_O].float(), values_OD[~kept_O].float()
        if not len(keys_ED) or not len(keys_KD):
            return keys_OD[kept_O], values_OD[kept_O]
        likeness_E, nearest_E = (normalize(keys_ED, dim=-1) @ normalize(keys_KD, dim=-1).mT).max(-1)
        weight_E = torch.where(likeness_E >= self.alike, likeness_E.exp(), 0)
        own = torch.ones((), dtype=torch.float32, device=keys_KD.device).exp()
        total_K = torch.full_like(keys_KD[:, 0], float(own)).index_add(0, nearest_E, weight_E)

        def merged(kept_KD: Tensor, others_ED: Tensor) -> Tensor:
            return (own * kept_KD).index_add(0, nearest_E, weight_E[:, None] * others_ED) / total_K[:, None]

        return merged(keys_KD, keys_ED).to(keys_OD.dtype), merged(values_KD, values_ED).to(values_OD.dtype)
