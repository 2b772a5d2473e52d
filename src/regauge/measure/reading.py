"""Windows of text or images, as a search reads them and scores what it read: one way for both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regauge.measure.images import Seen, read, scored
from regauge.measure.quality import Scores, compare_many
from regauge.measure.subject import logits
from regauge.text.windows import Windows

Read = Windows | Seen


def inputs_of(text: Read, tokens: int) -> list[Tensor | Mapping[str, Any]]:
    """What a model is given, batch by batch, of at most so many tokens of text."""
    return [batch.ids_BT for batch in text.batches(tokens)] if isinstance(text, Windows) else list(text.arguments)


def scores_of(text: Read, original: Iterable[Tensor], others: Sequence[Iterable[Tensor]], tokens: int) -> list[Scores]:
    """Scores of models whose logits come in the order of `inputs_of`."""
    if isinstance(text, Windows):
        return compare_many(text, original, others, tokens)
    return scored(text, original, others)


def logits_of(model: Any, text: Read, tokens: int) -> Iterator[Tensor]:
    """What a loaded model gives for each batch."""
    if isinstance(text, Windows):
        return logits(model, [batch.ids_BT for batch in text.batches(tokens)])
    return read(model, text)


def longest(text: Read) -> int:
    """Tokens of its longest window; 0 of images."""
    return max(len(ids) for ids in text.ids) if isinstance(text, Windows) else 0


def numbers(batch: Tensor | Mapping[str, Any]) -> int:
    """Tokens of a batch of text; images of one of images."""
    if isinstance(batch, Tensor):
        return batch.numel()
    first: Any = batch.get("pixel_values", batch.get("labels"))
    return len(first) if isinstance(first, torch.Tensor) else 0
