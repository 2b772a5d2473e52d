"""What lies outside the blocks after the moves of the whole model: embedding and head some rows at a time.

Every move takes a row of a table, or of a head, by itself (the residual runs along it), so rows can be moved apart, and
float64 is held of a strip alone. What comes out lies in mapped files, unlinked at once, where there is a folder for it.
Legend: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from regauge.anatomy import moves as algebra
from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move
from regauge.hosts.states import Spill

STRIP = 1 << 23
"""Weights of a strip."""
TABLES = ("embed.weight", "head.weight", "head.bias")

Stored = Callable[[Weights, Weights], Weights]
"""Exact tensors, and those they came from → rounded to what will be stored."""


def by_strips(
    moves: Sequence[Move], anatomy: Anatomy, source: Weights, stored: Stored, store: Spill | None
) -> tuple[Weights, Weights]:
    """(exact in float64, as they will be stored) of the tensors outside the blocks.

    Args:
        store: where what is as long as a vocabulary goes; None: memory.
    """
    tables = {name: source[name] for name in TABLES if name in source}
    lengths = {len(tensor) for tensor in tables.values()}
    widest = max((tensor[0].numel() for tensor in tables.values()), default=1)
    (rows,) = lengths if len(lengths) == 1 else (0,)
    step = max(1, STRIP // widest)
    if rows <= step:
        exact = algebra.apply(moves, anatomy, source, dtype=torch.float64)
        return exact, stored(exact, source)
    rest = {name: tensor for name, tensor in source.items() if name not in tables}
    whole: tuple[Weights, Weights] = ({}, {})
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        few = {**rest, **{name: tensor[part] for name, tensor in tables.items()}}
        exact = algebra.apply(moves, anatomy, few, dtype=torch.float64)
        for found, made in zip(whole, (exact, stored(exact, few)), strict=True):
            for name, tensor in made.items():
                if name not in TABLES:
                    found[name] = tensor
                    continue
                if name not in found:
                    found[name] = _room((rows, *tensor.shape[1:]), tensor.dtype, store)
                found[name][part] = tensor
    return whole


def _room(shape: tuple[int, ...], dtype: torch.dtype, store: Spill | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu") if store is None else store.room(shape, dtype)
