"""How much a compressed model differs from its original, token by token, on text that the search never saw.

Two models are read side by side, batch by batch, so that no logits are kept: perplexity, bits per byte, mean and
99th-percentile KL(original ‖ compressed) in nats a token, top-1 agreement, each with a bootstrap interval over
documents; and a paired bootstrap that compares two compressed models on the same tokens.

Lower = better for perplexity, bits per byte and KL; higher = better for agreement.
Cost: one forward pass of each model over the text.
Legend: B windows, T tokens, V vocabulary, N scored tokens, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from regauge.errors import TextError
from regauge.kernels.cpu.machine import trim
from regauge.measure.bootstrap import FEW, Draws, Floats, Interval, Ints, per_document, quantile, ratio
from regauge.text.windows import Batch, Windows, begin

CHUNK = 1 << 19
"""Logits scored at a time: with twice as many, of which five copies are made, scoring takes 1.4 times as long."""
LARGE = 1 << 24
"""Logits of a batch from which what each model leaves is given back before the next one runs."""


Kind = Literal["tokens", "classes", "scales"]
"""What is scored: next tokens of texts, classes of images (one of each), or tokens of images, scale by scale."""


class Quality(BaseModel):
    """Figures of one model on one text, or on images. `kl*` and `agreement` are to the original, whose own are 0 and 1.

    Attributes:
        kind: what is scored.
        tokens, documents: of texts; of images, what is scored and images.
        nats: of images: −log q of what is right, a class or a token. right: share of classes that are right, and
            `right_gap` that share less the original's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int
    documents: int
    bytes: int
    perplexity: Interval
    bits_per_byte: Interval | None = None  # None: of images
    kl: Interval  # nats a token
    kl99: Interval  # nats
    agreement: Interval  # share of tokens with the same most likely next token
    units: int | None = None  # windows that were drawn in place of documents, where those are too few; None: documents
    kind: Kind = "tokens"
    nats: Interval | None = None
    right: Interval | None = None
    right_gap: Interval | None = None

    @property
    def error(self) -> float:
        """The standard error of the share that is right."""
        share = 0.0 if self.right is None else self.right.value
        return math.sqrt(share * (1 - share) / max(self.tokens, 1))

    @property
    def drawn(self) -> int:
        """Of how many units intervals are."""
        return self.documents if self.units is None else self.units


class Paired(BaseModel):
    """Mean KL of one compressed model less that of another, on the same tokens, documents drawn together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    difference: Interval  # nats a token; below 0: the first is better
    verdict: str  # first | second | neither

    @property
    def decided(self) -> bool:
        return self.verdict != "neither"


@dataclass(frozen=True, eq=False)
class Scores:
    """Per scored token, in text order.

    Attributes:
        nll_N: −log q(next token) under the compressed model, nats.
        nll_original_N: the same under the original.
        kl_N: KL(original ‖ compressed) of the whole next-token distribution, nats.
        agree_N: 1 where both have the same most likely token.
        document_N: which document, or window where documents are too few to be drawn.
        bytes_D: bytes the scored tokens of each of those stand for.
        documents: how many there are, where windows stand in their place.
        kind: of `Quality`. right_N, right_original_N: 1 where the class is right, of classes.
    """

    nll_N: Floats
    nll_original_N: Floats
    kl_N: Floats
    agree_N: Floats
    document_N: Ints
    bytes_D: Floats
    documents: int | None = None
    kind: Kind = "tokens"
    right_N: Floats | None = None
    right_original_N: Floats | None = None


def token_scores(log_p_NV: Tensor, compressed_NV: Tensor, next_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, KL from the original, agreement) of each row, given the original's log-probabilities."""
    log_q_NV = torch.log_softmax(compressed_NV.float(), dim=-1)
    nll_N = -log_q_NV.gather(-1, next_N.unsqueeze(-1)).squeeze(-1)
    return nll_N, *divergence(log_p_NV, log_q_NV)


def divergence(log_p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL from the original, agreement) of each row of log-probabilities."""
    agree_N = (log_p_NV.max(-1).indices == log_q_NV.max(-1).indices).float()  # a third of the time of argmax
    return (log_p_NV - log_q_NV).mul_(log_p_NV.exp()).sum(-1).clamp_min(0.0), agree_N


def _parts(batch: Batch, logits_BTV: Tensor) -> Iterator[tuple[int, slice]]:
    """The scored positions, padding left out: a window and some of its places at a time, whose logits stay in cache."""
    step = max(1, CHUNK // logits_BTV.shape[-1])
    for row, length in enumerate(batch.lengths):
        for start in range(begin(length, batch.halved), length - 1, step):
            yield row, slice(start, min(start + step, length - 1))


def compare(windows: Windows, original: Iterable[Tensor], compressed: Iterable[Tensor], tokens: int = 4096) -> Scores:
    """Scores of two models whose logits (B, T, V) come in the order of `windows.batches(tokens)`."""
    return compare_many(windows, original, [compressed], tokens)[0]


def compare_many(
    windows: Windows, original: Iterable[Tensor], compressed: Sequence[Iterable[Tensor]], tokens: int = 4096
) -> list[Scores]:
    """Scores of several compressed models against one original, all read side by side."""
    nll_original: list[Tensor] = []
    columns: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in compressed]
    readers = [iter(one) for one in compressed]
    owner: list[int] = []
    few, place = windows.documents < FEW, 0
    for batch, first_BTV in zip(windows.batches(tokens), original, strict=True):
        known = [
            (row, part, torch.log_softmax(first_BTV[row, part].float(), dim=-1))
            for row, part in _parts(batch, first_BTV)
        ]
        after = [batch.ids_BT[row, part.start + 1 : part.stop + 1] for row, part, _ in known]
        nll_original += [
            -p_NV.gather(-1, n_N[:, None]).squeeze(-1) for (_, _, p_NV), n_N in zip(known, after, strict=True)
        ]
        for column, reader in zip(columns, readers, strict=True):  # one model's logits at a time
            other_BTV = next(reader, None)
            if other_BTV is None:
                raise ValueError("a model has fewer batches of logits than there are of text")
            column += [
                token_scores(p_NV, other_BTV[row, part], n_N)
                for (row, part, p_NV), n_N in zip(known, after, strict=True)
            ]
            del other_BTV
            if first_BTV.numel() >= LARGE:
                trim()  # the strips and logits of one model would stay, in pieces, beside the next one's
        for length, document in zip(batch.lengths, batch.document, strict=True):
            owner.extend([place if few else document] * (length - 1 - begin(length, batch.halved)))
            place += 1
    if not owner:
        raise TextError("no token to score: every window holds fewer than two tokens.")
    owner_N = np.array(owner, dtype=np.int64)
    bytes_D = np.array(windows.bytes, dtype=np.float64) * (0.5 if windows.halved else 1.0)
    if not few:
        bytes_D = per_document(bytes_D, np.array(windows.document, dtype=np.int64), windows.documents)
    base_N = torch.cat(nll_original).double().numpy()
    found = []
    for column in columns:
        nll_N, kl_N, agree_N = (torch.cat(parts).double().numpy() for parts in zip(*column, strict=True))
        found.append(Scores(nll_N, base_N, kl_N, agree_N, owner_N, bytes_D, windows.documents if few else None))
    return found


def summarise(scores: Scores, seed: int = 0) -> Quality:
    """Scores → figures with 95% intervals over documents, or over windows where documents are few."""
    documents = len(scores.bytes_D)
    draws = Draws.make(documents, seed)
    tokens_D = per_document(np.ones_like(scores.kl_N), scores.document_N, documents)
    nll_D = per_document(scores.nll_N, scores.document_N, documents)
    nll = ratio(nll_D, tokens_D, draws)
    of_text = scores.kind == "tokens"
    right_D, before_D = (
        None if one is None else per_document(one, scores.document_N, documents)
        for one in (scores.right_N, scores.right_original_N)
    )
    return Quality(
        tokens=len(scores.kl_N),
        documents=documents if scores.documents is None else scores.documents,
        units=None if scores.documents is None else documents,
        bytes=int(scores.bytes_D.sum()),
        perplexity=Interval(value=_exp(nll.value), low=_exp(nll.low), high=_exp(nll.high)),
        bits_per_byte=ratio(nll_D / math.log(2), np.maximum(scores.bytes_D, 1e-9), draws) if of_text else None,
        kl=ratio(per_document(scores.kl_N, scores.document_N, documents), tokens_D, draws),
        kl99=quantile(scores.kl_N, scores.document_N, 0.99, draws),
        agreement=ratio(per_document(scores.agree_N, scores.document_N, documents), tokens_D, draws),
        kind=scores.kind,
        nats=None if of_text else nll,
        right=None if right_D is None else ratio(right_D, tokens_D, draws),
        right_gap=None if right_D is None or before_D is None else ratio(right_D - before_D, tokens_D, draws),
    )


def paired(first: Scores, second: Scores, seed: int = 0) -> Paired:
    """Which of two compressed models is nearer to the original: mean KL, documents drawn for both at once."""
    if not np.array_equal(first.document_N, second.document_N):
        raise TextError("a paired comparison needs both models scored on the same windows.")
    documents = len(first.bytes_D)
    gap_D = per_document(first.kl_N - second.kl_N, first.document_N, documents)
    tokens_D = per_document(np.ones_like(first.kl_N), first.document_N, documents)
    gap = ratio(gap_D, tokens_D, Draws.make(documents, seed))
    verdict = "neither" if documents < FEW else "first" if gap.high < 0 else "second" if gap.low > 0 else "neither"
    return Paired(difference=gap, verdict=verdict)


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
