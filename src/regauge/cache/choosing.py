"""Which tokens stay: a score, a budget and a disposal together, on what one layer holds.

Legend: B sequences, H KV heads, T tokens held, O the older of them (all but the window), K kept of those, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.cache.base import Budget, Disposal, Layer, Score, Seen


@dataclass(frozen=True, eq=False)
class Choice:
    """What stays of the older tokens of a layer.

    Attributes:
        kept_BHO: bool; whole blocks in every head. Padding is among them only where a head has too few tokens to fill
            its last block, and stands in front.
        lengths_BH: int64, how many.
        firsts_BH: int64, the first of them that is no padding.
    """

    kept_BHO: Tensor
    lengths_BH: Tensor
    firsts_BH: Tensor


def choose(score: Score, budget: Budget, seen: Seen, layer: Layer) -> Choice:
    """What each head keeps of its older tokens, whose number is whole blocks.

    Raises:
        ValueError: it is not.
    """
    older = seen.older
    if older < 0 or older % layer.block:
        raise ValueError(f"{older} older tokens are not whole blocks of {layer.block}")
    score_BHO = score(seen).float()[:, :, :older]
    if score.sinks:
        score_BHO = score_BHO.masked_fill(seen.first_tokens_BHT(score.sinks)[:, :, :older], torch.inf)
    real_BHO = seen.positions_BHT[:, :, :older] >= 0
    score_BHO = score_BHO.masked_fill(~real_BHO, -torch.inf)
    lengths_BH = budget(score_BHO, seen, layer)
    # newest first where they are as good
    rank_BHO = torch.argsort(score_BHO.flip(-1), dim=-1, descending=True, stable=True).argsort(-1).flip(-1)
    kept_BHO = rank_BHO < lengths_BH.unsqueeze(-1)
    return Choice(kept_BHO, lengths_BH, (kept_BHO & ~real_BHO).sum(-1))


def disposed(disposal: Disposal, seen: Seen, choice: Choice) -> list[list[tuple[Tensor, Tensor]]]:
    """(keys_KD, values_KD) that each head of each sequence keeps of the older tokens. Padding is never merged.

    Where padding fills up a head's first block, it stands in front.
    """
    out = []
    for b, row in enumerate(choice.kept_BHO):
        out.append([_of_head(disposal, seen, b, h, kept_O) for h, kept_O in enumerate(row)])
    return out


def _of_head(disposal: Disposal, seen: Seen, b: int, h: int, kept_O: Tensor) -> tuple[Tensor, Tensor]:
    older = len(kept_O)
    keys_OD, values_OD = seen.keys_BHTD[b, h, :older], seen.values_BHTD[b, h, :older]
    real_O = seen.positions_BHT[b, h, :older] >= 0
    found = disposal(keys_OD[real_O], values_OD[real_O], kept_O[real_O])
    filling_O = kept_O & ~real_O
    if not bool(filling_O.any()):
        return found
    return torch.cat((keys_OD[filling_O], found[0])), torch.cat((values_OD[filling_O], found[1]))
