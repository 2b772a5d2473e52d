"""What flows between blocks: the hidden states of every batch, and the arguments each layer was called with.

Arguments are recorded from transformers' own forward, never constructed: masks and rotary tables differ by family, by
kind of layer and by batch. Equal tensors are kept once. Legend: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPILL = 128 << 20  # bytes of states from which they go to mapped files
POOL = 16  # how many tensors of one shape are compared before giving up on sharing


@dataclass(frozen=True)
class Call:
    """What a layer was called with, after its hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Spill:
    """A directory for states that do not fit in memory: files are mapped and unlinked, so nothing stays behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = count()

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.room(tuple(tensor.shape), tensor.dtype).copy_(tensor.detach())

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros in a file of its own."""
        path, count = self.folder / f"states-{next(self._numbers)}.bin", math.prod(shape)
        with path.open("wb") as file:
            file.truncate(max(1, count * dtype.itemsize))
        mapped = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        with suppress(PermissionError):  # a system that keeps the names of mapped files; the folder goes later
            path.unlink()
        return mapped.view(shape)


@dataclass(frozen=True)
class States:
    """Hidden states before some block.

    Attributes:
        inputs: what each batch was called with.
        hidden: (B, T, D) of each batch.
        calls: of each batch, what each layer was called with.
        store: where new states go, or None for memory.
        ends: of each stack of blocks that has been run before this one (an encoder), the last states of each batch.
        alone: whether blocks can be gone on with from these states and a new beginning; not so where a stack reads
            another, or blocks hand on more than states.
    """

    inputs: tuple[Mapping[str, Any], ...]
    hidden: tuple[Tensor, ...]
    calls: tuple[tuple[Call, ...], ...]
    store: Spill | None = None
    ends: tuple[tuple[Tensor, ...], ...] = ()
    alone: bool = True

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def tokens(self) -> int:
        """How many tokens (padding included)."""
        return sum(h.shape[0] * h.shape[1] for h in self.hidden)

    def keep(self, batch: int) -> Tensor | None:
        """Which of a batch's B·T tokens are not padding, or None where all are."""
        mask = self.inputs[batch].get("attention_mask")
        if mask is None or mask.dim() != 2 or bool(mask.all()):
            return None
        flat: Tensor = mask.bool().reshape(-1)
        return flat

    def with_hidden(self, hidden: Sequence[Tensor]) -> States:
        """The same batches with other hidden states."""
        return replace(self, hidden=tuple(hidden))

    def spill(self, folder: str | Path) -> States:
        """The same states as mapped files in a directory, where all later ones go too."""
        store = Spill(Path(folder))
        return replace(self, hidden=tuple(store(h) for h in self.hidden), store=store)


class Pool:
    """Keeps equal tensors of many calls once: most batches have the same masks and rotary tables."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}

    def share(self, calls: Sequence[Call]) -> tuple[Call, ...]:
        """The calls of one batch with every tensor replaced by an equal one met before, where there is one."""
        done: dict[int, Tensor] = {}
        return tuple(Call(self._share(call.args, done), self._share(dict(call.kwargs), done)) for call in calls)

    def _share(self, value: Any, done: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in done:
                done[id(value)] = self._one(value)
            return done[id(value)]
        if type(value) in (tuple, list):
            return type(value)(self._share(item, done) for item in value)
        if type(value) is dict:
            return {key: self._share(item, done) for key, item in value.items()}
        return value

    def _one(self, tensor: Tensor) -> Tensor:
        known = self._kept.setdefault((tensor.shape, tensor.dtype), [])
        for other in known:
            if torch.equal(other, tensor):
                return other
        if len(known) < POOL:
            known.append(tensor)
        return tensor
