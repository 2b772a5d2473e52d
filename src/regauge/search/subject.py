"""The model under search: what the passes read, whichever gauge it is in.

`Subject` is a source, or a rewritten one: an anatomy, and canonical weights by block. The search works on it through
the runner, one block at a time, so a model larger than memory can be searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.errors import ModelError
from regauge.hosts import host_of
from regauge.hosts.base import Host, Runner, Source
from regauge.hosts.states import States
from regauge.text.split import Reader, window_length

Read = Callable[[int | None], Weights]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that can be run block by block."""

    source: Source
    anatomy: Anatomy
    read: Read
    runner: Runner

    @staticmethod
    def of(source: Source, hold: bool = True) -> Subject:
        """The source as it is. `hold` keeps every block in memory once read, for models that fit."""
        read: Read = source.block
        if hold:
            kept: dict[int | None, Weights] = {}

            def held(index: int | None) -> Weights:
                if index not in kept:
                    kept[index] = {name: tensor.float() for name, tensor in source.block(index).items()}
                return kept[index]

            read = held
        return Subject(source, source.anatomy, read, host_of(source.path).runner(source))

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


def reader(source: Source, seed: int) -> Reader:
    """What the texts are cut for.

    Raises:
        ModelError: the model predicts no next token, or has no tokenizer.
    """
    if not source.anatomy.causal or "head" not in {site.name for site in source.anatomy.sites}:
        raise ModelError(
            f"fit measures next-token KL, and {source.anatomy.family} predicts no next token; use apply with a recipe."
        )
    host, tokenizer = host_of(source.path), source.tokenizer()
    length = window_length(source.parameters(), host.context(source))

    def draw(count: int) -> tuple[list[str], str]:
        ids_NT, told = host.sample(source, tokenizer, count, length, seed)
        return [tokenizer.decode(row, skip_special_tokens=True) for row in ids_NT.tolist()], told

    return Reader(tokenizer, length, draw, source.anatomy.site("embed").shape[0])


def first(states: States, batches: int) -> States:
    """Only the first so many batches."""
    return replace(states, inputs=states.inputs[:batches], hidden=states.hidden[:batches], calls=states.calls[:batches])


def batches(ids: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """Windows of one length → batches of at most so many tokens (one window at least)."""
    rows = torch.stack(list(ids))
    return list(torch.split(rows, max(1, tokens // rows.shape[1])))
