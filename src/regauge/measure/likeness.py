"""How near a compressed model stays that gives labels or embeddings: the same texts through both, output by output.

Lower = better for KL; higher = better for agreement and cosine.
Legend: B texts of a batch, T tokens, C labels, N rows that are compared, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from regauge.measure.bootstrap import Draws, Interval, per_document, ratio
from regauge.measure.encoders import pooled
from regauge.measure.quality import token_scores
from regauge.measure.subject import LABEL, Facts, Outputs
from regauge.measure.subject import Batch as Arguments
from regauge.text.windows import Batch, Windows


class Labels(BaseModel):
    """A classifier against the original: over texts, or over tokens where it labels each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compared: int
    documents: int
    kl: Interval  # nats, KL(original ‖ compressed) of the labels
    agreement: Interval  # share with the same most likely label


@dataclass(frozen=True, eq=False)
class Read:
    """The same text as every model reads it.

    Attributes:
        batches: windows with the documents they are of.
        arguments: of each batch.
    """

    batches: tuple[Batch, ...]
    arguments: tuple[Arguments, ...]


def read(text: Windows, facts: Facts, tokens: int) -> Read:
    """Batches of at most so many tokens, padding masked; one text at a time where it is given one label, since
    decoders find the last token of a text only where nothing is padded."""
    batches = tuple(text.batches(1 if facts.gives == LABEL else tokens))
    if facts.generative:  # padding on the right, which nothing that is scored sees
        return Read(batches, tuple({"input_ids": batch.ids_BT} for batch in batches))
    return Read(batches, tuple({"input_ids": b.ids_BT, "attention_mask": _mask(b)} for b in batches))


def _mask(batch: Batch) -> Tensor:
    places = torch.arange(batch.ids_BT.shape[1], dtype=torch.int64, device="cpu")
    return (places < torch.tensor(batch.lengths, dtype=torch.int64, device="cpu")[:, None]).long()


def embeddings(given: Iterator[Tensor], seen: Read) -> Tensor:
    """(N, channels): the mean of each text's last hidden states, scaled to length 1."""
    masks = (arguments["attention_mask"] for arguments in seen.arguments)
    return torch.cat([pooled(hidden_BTD, mask_BT) for hidden_BTD, mask_BT in zip(given, masks, strict=True)])


def labels(original: Outputs, compressed: Outputs, seen: Read, seed: int) -> Labels:
    """A classifier against the original."""
    kl: list[Tensor] = []
    agree: list[Tensor] = []
    owner: list[int] = []
    for batch, first, other in zip(seen.batches, original(), compressed(), strict=True):
        first_NC, other_NC = _rows(first, batch), _rows(other, batch)
        log_p_NC = torch.log_softmax(first_NC.float(), dim=-1)
        _, kl_N, agree_N = token_scores(log_p_NC, other_NC, log_p_NC.argmax(-1))
        kl.append(kl_N)
        agree.append(agree_N)
        each = [1] * len(batch.lengths) if first.dim() == 2 else batch.lengths
        owner += [doc for doc, count in zip(batch.document, each, strict=True) for _ in range(count)]
    owner_N = np.array(owner, dtype=np.int64)
    documents = len(set(owner))
    draws = Draws.make(documents, seed)
    ones_D = per_document(np.ones(len(owner), dtype=np.float64), owner_N, documents)
    sums = [per_document(torch.cat(some).double().numpy(), owner_N, documents) for some in (kl, agree)]
    found_kl, found_agreement = (ratio(sum_D, ones_D, draws) for sum_D in sums)
    return Labels(compared=len(owner), documents=documents, kl=found_kl, agreement=found_agreement)


def _rows(given: Tensor, batch: Batch) -> Tensor:
    """(N, C): a row a text, or a row a token with padding left out."""
    if given.dim() == 2:
        return given
    return torch.cat([given[row, :length] for row, length in enumerate(batch.lengths)])
