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
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.states import States

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
        return Subject(source, source.anatomy, read, Runner(source))

    @property
    def blocks(self) -> int:
        return self.anatomy.blocks

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that is stored as it is."""
        return torch.empty((), dtype=self.source.dtype).element_size()


def first(states: States, batches: int) -> States:
    """Only the first so many batches."""
    return replace(states, inputs=states.inputs[:batches], hidden=states.hidden[:batches], calls=states.calls[:batches])


def batches(ids: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """Windows of one length → batches of at most so many tokens (one window at least)."""
    rows = torch.stack(list(ids))
    return list(torch.split(rows, max(1, tokens // rows.shape[1])))
