"""How near a compressed encoder stays: cosine of its embeddings to the original's, and rank correlation with people.

Legend: B texts, T tokens, D channels, N texts in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor


@torch.inference_mode()
def embed(model: Any, inputs: Sequence[Tensor], lengths: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Mean of the last hidden states over each text's own tokens, scaled to length 1: (N, D).

    Args:
        model: an encoder of the host; its output has `last_hidden_state`.
        inputs: padded ids (B, T) of each batch.
        lengths: true lengths of each batch's rows; None: nothing is padded.
    """
    found = []
    for index, ids_BT in enumerate(inputs):
        length_B = (
            torch.full((ids_BT.shape[0],), ids_BT.shape[1], dtype=torch.int64, device="cpu")
            if lengths is None
            else torch.tensor(lengths[index], dtype=torch.int64, device="cpu")
        )
        mask_BT = (torch.arange(ids_BT.shape[1], dtype=torch.int64, device="cpu") < length_B[:, None]).long()
        found.append(pooled(model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state, mask_BT))
    return torch.cat(found)


def pooled(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean of the last hidden states over each text's own tokens, scaled to length 1: (B, D) float32."""
    hidden_BTD = hidden_BTD.float()
    mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean_BD, dim=-1)


def cosine(first_ND: Tensor, second_ND: Tensor) -> float:
    """Mean cosine between the embeddings of the same texts by two models; higher = nearer."""
    return float(torch.nn.functional.cosine_similarity(first_ND, second_ND, dim=-1).mean())


def spearman(left_ND: Tensor, right_ND: Tensor, score_N: Sequence[float]) -> float:
    """Spearman correlation of the pairs' cosines with scores that people gave (STS-B), in points: 100 is perfect."""
    cosine_N = torch.nn.functional.cosine_similarity(left_ND, right_ND, dim=-1)
    return 100 * float(spearmanr(cosine_N.tolist(), list(score_N)).statistic)
