"""The model under search: what the passes read, whichever gauge it is in.

`Subject` is a source, or a rewritten one: an anatomy, and canonical weights by block. The search works on it through
runners, one block at a time, read from its mapped files, so a model larger than memory can be searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.engine.job import quickest
from regauge.errors import ModelError
from regauge.hosts import host_of
from regauge.hosts.base import Host, Runner, Source
from regauge.hosts.states import States
from regauge.measure.subject import Facts
from regauge.text.length import asked_length
from regauge.text.split import Reader

Read = Callable[[int | None], Weights]


HELD = 2**28  # bytes of a model in float32 up to which it is read once and kept
ROWS = 2048  # tokens of a batch
LOGITS = 2**25  # at most, of a batch


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that can be run block by block.

    Attributes:
        runner: what variants are compared by: hidden states, norms and logits in float32, and products in float32 too,
            or in bfloat16 where the source has it, is wide and this CPU multiplies it faster.
        quick: what statistics and gradients are taken by: all of it in the dtype of those products.
        exact: all of it in float32: what final figures are held to.
    """

    source: Source
    anatomy: Anatomy
    read: Read
    runner: Runner
    quick: Runner
    exact: Runner

    @staticmethod
    def of(source: Source, hold: bool = True) -> Subject:
        """The source as it is. `hold` keeps every block in memory once read, where the model is small."""
        read: Read = source.block
        if hold and 4 * source.parameters() <= HELD:
            kept: dict[int | None, Weights] = {}

            def held(index: int | None) -> Weights:
                if index not in kept:
                    kept[index] = {name: tensor.float() for name, tensor in source.block(index).items()}
                return kept[index]

            read = held
        host = host_of(source.path)
        exact, products = host.runner(source), quickest(source.dtype, source.anatomy.hidden)
        if products is torch.float32:
            return Subject(source, source.anatomy, read, exact, exact, exact)
        mixed, quick = host.runner(source, matrices=products), host.runner(source, dtype=products)
        return Subject(source, source.anatomy, read, mixed, quick, exact)

    @property
    def products(self) -> torch.dtype:
        """The dtype of the products that variants, statistics and gradients are taken by."""
        return torch.float32 if self.quick is self.exact else torch.bfloat16

    @property
    def batch(self) -> int:
        """Tokens of a batch: fewer where the vocabulary is large, whose logits are most of what a pass holds."""
        return ROWS if self.pictured else batch_tokens(self.anatomy.site("embed").shape[0])

    @property
    def pictured(self) -> bool:
        """Whether it is a model of images."""
        return self.host.medium(self.source) == "images"

    @property
    def host(self) -> Host:
        """The model library that opened the source."""
        return host_of(self.source.path)

    @property
    def blocks(self) -> int:
        return self.anatomy.blocks

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that is stored as it is."""
        return torch.empty((), dtype=self.source.dtype, device="cpu").element_size()


def batch_tokens(vocabulary: int) -> int:
    """Tokens of a batch at most, for a vocabulary of so many."""
    return max(256, min(ROWS, LOGITS // vocabulary))


def predicting(source: Source) -> Facts | None:
    """Refuses a model that a search cannot measure, before any work; what a model of images reads and gives.

    Raises:
        ModelError: it predicts no next token, and no class or token of images.
    """
    if host_of(source.path).medium(source) == "images":
        facts = host_of(source.path).facts(source.path)
        if facts.pictured:
            return facts
    if not source.anatomy.causal or "head" not in {site.name for site in source.anatomy.sites}:
        raise ModelError(
            f"fit measures next-token KL, and {source.anatomy.family} predicts no next token; use apply with a recipe."
        )
    return None


def reader(source: Source, seed: int, length: int | None = None) -> Reader:
    """What the texts are cut for.

    Args:
        length: tokens of a window, where the user says how many.

    Raises:
        TextError: the model does not read so many at once, or they hold no text.
        ModelError: it has no tokenizer.
    """
    host, tokenizer = host_of(source.path), source.tokenizer()
    length = asked_length(length, source.parameters(), host.context(source))

    def draw(count: int) -> tuple[list[str], str]:
        ids_NT, told = host.sample(source, tokenizer, count, length, seed)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in ids_NT.tolist()], told

    return Reader(tokenizer, length, draw, source.anatomy.site("embed").shape[0])


def some(states: States, start: int, stop: int | None = None) -> States:
    """Only some batches."""
    part = slice(start, stop)
    return replace(states, inputs=states.inputs[part], hidden=states.hidden[part], calls=states.calls[part])


def batches(ids: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """Windows of one length → batches of at most so many tokens (one window at least)."""
    rows = torch.stack(list(ids))
    return list(torch.split(rows, max(1, tokens // rows.shape[1])))
