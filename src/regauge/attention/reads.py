"""Attention that reads queries, keys, values or probabilities otherwise: rounded to codes, and taken as these stand.

A row is one token's head, of the probabilities one query's head; what a reading rounds, it rounds row by row, so every
head of a batch is read as it is alone. What no query may see stays 0 whatever the grid.

Cost: the softmax written out, B·H·Q·T numbers, where a fused attention keeps none of them.

Legend: B sequences, H query heads, K KV heads, Q queries, T keys, D and E channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.anatomy.inner import KEYS, PROBABILITIES, QUERIES, VALUES
from regauge.attention.maps import probabilities


@runtime_checkable
class Read(Protocol):
    """What stands in for rows (..., channels): a reading of a tap, or what a cache gives back."""

    def simulate(self, x: Tensor) -> Tensor: ...
    def passed(self, x: Tensor) -> Tensor:
        """`simulate`, to the bit, differentiable."""


Readings = Mapping[str, Read]
"""Word of `anatomy.inner.ATTENDED` → how it is read; absent: as it is."""


def read(x: Tensor, reading: Read | None) -> Tensor:
    """x (..., channels) as it comes back from its codes; where a gradient is taken, one that passes."""
    if reading is None:
        return x
    return reading.passed(x) if x.requires_grad else reading.simulate(x)


def attended(
    given: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scale: float,
    readings: Readings,
    see: Callable[[str, Tensor], None] | None = None,
) -> Tensor:
    """(B, Q, H, E).

    Args:
        given: queries (B, H, Q, D), keys (B, K, T, D) and values (B, K, T, E).
        mask: bool, true where a query sees, or what is added to products; None: causal.
        see: is shown what stands at each word before it is read.
    """
    taken = dict[str, Tensor]()
    for word, tensor in zip((QUERIES, KEYS, VALUES), given, strict=True):
        if see is not None:
            see(word, tensor)
        taken[word] = read(tensor, readings.get(word))
    p_BHQT = probabilities(taken[QUERIES], taken[KEYS], mask, scale)
    if see is not None:
        see(PROBABILITIES, p_BHQT)
    if PROBABILITIES in readings:
        p_BHQT = torch.where(p_BHQT > 0, read(p_BHQT, readings[PROBABILITIES]), 0.0)
    value_BHTE = taken[VALUES].repeat_interleave(p_BHQT.shape[1] // taken[VALUES].shape[1], 1)
    return (p_BHQT @ value_BHTE).transpose(1, 2)


@dataclass(eq=False)
class Ranges:
    """The least and the greatest value of each channel that was seen, by word; of probabilities, of all of them."""

    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def see(self, word: str, x: Tensor) -> None:
        """Takes more values (..., channels)."""
        rows = x.detach().float().reshape(-1, 1 if word == PROBABILITIES else x.shape[-1])
        low, high = torch.aminmax(rows, dim=0)
        if word in self.found:
            before = self.found[word]
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        self.found[word] = (low, high)

    def stats(self, word: str) -> dict[str, Tensor]:
        """`minimum` and `maximum`, as a static step wants them."""
        low, high = self.found[word]
        return {"minimum": low, "maximum": high}
