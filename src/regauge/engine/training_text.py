"""What a family is trained on: the user's text in two parts that share no stretch, as batches of windows; an encoder's
as whole texts, a line each, padded to those of about their length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from regauge.artifact.staging import Staging
from regauge.engine.raising import Batch
from regauge.engine.recovery_text import HELD_OUT, Amounts, Material, held_out, material, to_train_on
from regauge.engine.training_classes import Classed, classed, classifies
from regauge.engine.training_images import Pictured, Pictures, batched, pictured, pictures
from regauge.engine.watchdog import Clock
from regauge.errors import TextError
from regauge.hosts.base import Source
from regauge.learn.loop import order
from regauge.text.corpora import Where
from regauge.text.tokens import within

MOST = 1 << 22  # tokens that are read at most
SHORT = 128  # tokens of a text that an encoder reads, where nobody says how many


@dataclass(frozen=True, eq=False)
class Reading:
    """The text of a training.

    Attributes:
        aside: batches held out.
    """

    material: Material
    source: Source
    batch: int
    aside: tuple[Batch, ...]

    def text(self, tokens: int, staging: Staging, clock: Clock) -> tuple[Batch, ...]:
        """Batches to train on, of `tokens` at most."""
        if not self.source.anatomy.causal:
            return encoded(self.source, self.material.first, self.material.length, self.batch, tokens)
        windows = to_train_on(self.material, self.source, staging, clock, min(tokens, MOST))
        return batched(windows.inputs, self.batch)

    @property
    def description(self) -> str:
        """Where it comes from."""
        return "the model's own samples" if self.material.given is None else self.material.given.description


def opened(source: Source, text: Where | None, amounts: Amounts, seed: int) -> Material | Pictures | Classed:
    """The text, or the images of a model that draws them, checked and split.

    Raises:
        TextError: it cannot be used; an encoder samples none of its own.
    """
    if source.anatomy.plumbing.scales:
        return pictures(source, text, seed)
    if classifies(source):
        return classed(source, text)
    if text is None and not source.anatomy.causal:
        raise TextError("this model writes no text of its own to be trained on; give --text.")
    if not source.anatomy.causal and amounts.length is None:
        amounts = Amounts(amounts.tokens, SHORT, amounts.steps, amounts.time)
    return material(source, text, amounts, seed)


def reading(
    found: Material | Pictures | Classed, source: Source, batch: int, staging: Staging, clock: Clock
) -> Reading | Pictured | Classed:
    """The text with what is held out of it cut."""
    if isinstance(found, Pictures):
        return pictured(found, batch)
    if isinstance(found, Classed):
        return replace(found, batch=batch)
    if source.anatomy.causal:
        aside = batched(held_out(found, source, staging, clock).inputs, batch)
    else:
        aside = encoded(source, found.second, found.length, batch, HELD_OUT)
    return Reading(found, source, batch, aside)


def encoded(source: Source, stretches: Sequence[str], length: int, batch: int, tokens: int) -> tuple[Batch, ...]:
    """Texts, a line each, several of about one length to a batch of at most so many tokens with their padding."""
    tokenizer: Any = source.tokenizer()
    lines = [line for stretch in stretches for line in stretch.splitlines() if line.strip()]
    lines = list(dict.fromkeys(lines))
    found, read = list[list[int]](), 0
    for index in order(0, 0, len(lines)).tolist():  # no document before another
        ids = tokenizer.encode(lines[index], truncation=True, max_length=length)
        found.append(ids)
        read += len(ids)
        if read >= tokens:
            break
    found.sort(key=len)
    made, begin = list[Batch](), 0
    while begin < len(found):
        end = begin + 1
        while end < len(found) and len(found[end]) * (end + 1 - begin) <= batch:
            end += 1
        made.append(_padded(found[begin:end]))
        begin = end
    within([one.ids_BT for one in made], source.anatomy.site("embed").shape[0], tokenizer)
    return tuple(made)


def _padded(rows: Sequence[Sequence[int]]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64, device="cpu")
    length = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
    mask = (torch.arange(longest, dtype=torch.int64, device="cpu") < length[:, None]).long()
    return Batch(ids, mask)
