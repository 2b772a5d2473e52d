"""Contracts of the cache's axes beside its formats.

A **score** says which tokens matter to a head, **higher = keep**. A **budget** says how many older tokens each head
keeps, in whole blocks, and a **disposal** what becomes of the others. A **merge** keeps one direction for two layers.
The newest tokens, the window, are no matter of theirs: they always stay.

Legend: B sequences, H KV heads, G query heads that read one KV head, Q queries (of the newest tokens), T tokens held,
O the older of them (T less the window), K kept of the older ones, N blocks, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

NOTHING = -1
"""The position of a row that holds no token: padding, or the end of a shorter head."""


@dataclass(frozen=True)
class Rotary:
    """How keys and queries are turned by their position.

    Attributes:
        radians: for every position, one number a pair of channels; none where a model turns nothing.
        halves: the pairs are (i, i + number of pairs), as transformers has them, or else neighbours (2i, 2i + 1).
            Channels behind the last pair are not turned.
    """

    radians: tuple[float, ...] = ()
    halves: bool = True


@dataclass(frozen=True, eq=False)
class Seen:
    """What scores and budgets read of one layer.

    Attributes:
        keys_BHTD, values_BHTD: what is held, keys with their rotation; the newest last.
        positions_BHT: the place of each in the text, int64, ascending; `NOTHING` for padding.
        queries_BHGQD: of the newest Q tokens, with their rotation; Q as many as the score asks for, or fewer.
        window: newest tokens that stay whatever the score says.
        scale: what products of queries and keys are multiplied by.
        softcap: products become softcap · tanh(product / softcap); 0: they stay.
        mass_BHT: attention that each token has had from all queries so far, where the score asks for it.
        rotary: None where it is not known.
        text_B: tokens of each text so far, padding not counted, where some were let go before; None: as are held.
        causal: each query reads what came before it and itself; else all, as those of one scale of an image do.
    """

    keys_BHTD: Tensor
    values_BHTD: Tensor
    positions_BHT: Tensor
    queries_BHGQD: Tensor
    window: int
    scale: float
    softcap: float = 0.0
    mass_BHT: Tensor | None = None
    rotary: Rotary | None = field(default_factory=Rotary)
    text_B: Tensor | None = None
    causal: bool = True

    @property
    def older(self) -> int:
        """O, rows that a budget is about."""
        return self.keys_BHTD.shape[2] - self.window

    @property
    def real_BH(self) -> Tensor:
        """Tokens, padding not counted, among the older ones."""
        return (self.positions_BHT[:, :, : self.older] >= 0).sum(-1)

    @property
    def texts(self) -> list[int]:
        """Tokens of each text so far, padding not counted."""
        counts_B = (self.positions_BHT >= 0).sum(-1).amax(1) if self.text_B is None else self.text_B
        return [int(count) for count in counts_B]

    @property
    def seen(self) -> int:
        """Tokens of the text so far, padding among them."""
        return int(self.positions_BHT.max()) + 1

    def first_tokens_BHT(self, count: int) -> Tensor:
        """Which are among the first `count` tokens that each head holds: the sinks, where they were never let go."""
        held_BHT = self.positions_BHT >= 0
        return held_BHT & (held_BHT.cumsum(-1) <= count)


@dataclass(frozen=True)
class Layer:
    """Where a layer stands, and what its store takes.

    Attributes:
        number, layers: of those whose caches are chosen from, from 0.
        block: tokens of a block; what stays of the older tokens is whole blocks.
    """

    number: int
    layers: int
    block: int


@runtime_checkable
class Score(Protocol):
    """Which tokens matter. Higher = keep."""

    @property
    def sinks(self) -> int:
        """Tokens at the front that are never taken."""

    @property
    def queries(self) -> int:
        """How many of the newest tokens' queries it reads."""

    @property
    def accumulates(self) -> bool:
        """Whether it reads the attention of every query so far."""

    @property
    def turns(self) -> bool:
        """Whether it undoes the rotation of queries."""

    def __call__(self, seen: Seen) -> Tensor:
        """score_BHT, float32, of everything held; what stands at padding and in the window is not read."""


@runtime_checkable
class Budget(Protocol):
    """How many older tokens each head keeps."""

    @property
    def queries(self) -> int:
        """How many of the newest tokens' queries it reads."""

    def __call__(self, score_BHO: Tensor, seen: Seen, layer: Layer) -> Tensor:
        """lengths_BH, int64, multiples of the layer's block; 0 to all blocks that there are."""

    def least(self, seen: int) -> int:
        """Tokens, window and all, that the mean head of the mean layer may keep of so many seen."""


@runtime_checkable
class Disposal(Protocol):
    """What becomes of the tokens that are not kept."""

    @property
    def merges(self) -> bool:
        """Whether those that are kept change by it."""

    def __call__(self, keys_OD: Tensor, values_OD: Tensor, kept_O: Tensor) -> tuple[Tensor, Tensor]:
        """(keys_KD, values_KD) in the place of those kept, in their order. `kept_O` is bool."""


def probabilities(seen: Seen) -> Tensor:
    """p_BHGQT, float32: what each of the queries reads of each token, none of it of padding or of later ones.

    Raises:
        ValueError: there are no queries.
    """
    queries_BHGQD = seen.queries_BHGQD.float()
    asked = queries_BHGQD.shape[3]
    if not asked:
        raise ValueError("no queries were kept, and the score reads them")
    weight_BHGQT = queries_BHGQD @ seen.keys_BHTD.float().unsqueeze(2).mT * seen.scale
    if seen.softcap:
        weight_BHGQT = (weight_BHGQT / seen.softcap).tanh() * seen.softcap
    last = seen.seen - asked + torch.arange(asked, dtype=torch.int64, device=weight_BHGQT.device)
    positions_BH1T = seen.positions_BHT.unsqueeze(2)
    shown_BHQT = (positions_BH1T >= 0) & ((positions_BH1T <= last[:, None]) | (not seen.causal))
    weight_BHGQT = weight_BHGQT.masked_fill(~shown_BHQT.unsqueeze(2), -torch.inf)
    return weight_BHGQT.softmax(-1).nan_to_num(0)  # a query of padding sees nothing
