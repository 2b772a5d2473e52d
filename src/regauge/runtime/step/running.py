"""The state of a running step: a program, where the stores lie that it was last pointed at, and one lock.

Legend: B sequences, Q new tokens of each, N = B·Q, H channels of the residual, V rows of the head.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.kernels.cpu.matrix import DTYPES
from regauge.kernels.cpu.step import Program
from regauge.kernels.cpu.store import Store
from regauge.runtime.step.program import Copy
from regauge.runtime.store.growing import Growing
from regauge.runtime.store.settling import settle

SHAPE = "the cache is of another shape than the model's, or than the tokens'"


@runtime_checkable
class Inputs(Protocol):
    """What a host gives to the step besides weights and stores."""

    def embedded(self, ids_BQ: Tensor, positions: list[int]) -> Tensor:
        """(N, H), float32, contiguous."""

    def rotary(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """(cosines, sines) of each kind of rotary embedding, of at least so many positions."""


class Running:
    """One program on the stores of one text after another. Threads take turns.

    Attributes:
        program: what runs.
        refused: why the stores that it was last pointed at cannot be read, as the end of a sentence; "": they can.
    """

    def __init__(self, program: Program, copies: Sequence[Copy] = ()) -> None:
        self.program, self._copies = program, copies
        self.refused = ""
        self._pointed: list[int] = []  # stamps of stores, and first tokens
        self._sequences = 0
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Copies anew what the program keeps copies of."""
        with self._lock:
            for copy in self._copies:
                copy.refresh()

    def step(
        self,
        stores: Sequence[Growing],
        ids_BQ: Tensor,
        positions: list[int],
        starts: list[int],
        inputs: Inputs,
        last: bool,
    ) -> Tensor | None:
        """Logits (N, V), or (B, V) of the last ones, of a few new tokens of each sequence, which the stores then hold.
        None where the stores are not of the program's shape, or hold another number of sequences.

        Args:
            positions: of every new token.
            starts: the first token of each sequence that counts.
            last: only the last token of each sequence is wanted.
        """
        batch, new = ids_BQ.shape
        with self._lock:
            for store in stores:
                if store.length - store.origin + new > store.room:
                    store.reserve(new)
            pointed = [*(store.stamp for store in stores), *starts]
            if pointed != self._pointed:
                self._pointed, self._sequences = pointed, 0
                self.refused = self._point(stores, starts)
            if self._sequences != batch:
                self.refused = self.refused or SHAPE
                return None
            lengths = [store.length for store in stores]
            tables = inputs.rotary(max(positions) + 1)
            logits = self.program(inputs.embedded(ids_BQ, positions), positions, starts, tables, lengths, last)
            for store in stores:
                store.length += new
            settle(stores)
        return logits

    def _point(self, stores: Sequence[Growing], starts: Sequence[int]) -> str:
        """Tells the program where the stores lie, or says why it cannot read them."""
        places, batches = [], set()
        for store, size in zip(stores, self.program.cached, strict=True):
            keys, values = store.keys_BHTD, store.values_BHTD
            if keys is None or values is None or keys.shape != values.shape or (keys.shape[1], keys.shape[3]) != size:
                return SHAPE
            if any(held.dtype not in DTYPES or held.device.type != "cpu" for held in (keys, values)):
                return "the cache is of another dtype than the step reads, or on another device"
            batches.add(keys.shape[0])
            if any(store.hadamard) and keys.shape[3] & (keys.shape[3] - 1):
                return f"the cache is turned, and heads of {keys.shape[3]} channels are no power of two"
            places.append(Store(keys, values, store.origin, parts=store.parts(starts), hadamard=store.hadamard))
        if len(batches) != 1:
            return SHAPE
        self.program.keep(places)
        self._sequences = batches.pop()
        return ""


def first_tokens(mask: object, batch: int, tokens: int) -> list[int] | None:
    """The first token of each sequence that counts; None where the mask says more than padding on the left.

    Args:
        mask: (B, T), or None: all count.
        tokens: T, the new ones among them.
    """
    if mask is None:
        return [0] * batch
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != (batch, tokens):
        return None
    if batch == 1 and int(mask.count_nonzero()) == tokens:
        return [0]
    shown_BT = (mask != 0).view(torch.uint8)
    starts: list[int] = shown_BT.argmax(1).tolist()
    counted: list[int] = shown_BT.count_nonzero(1).tolist()
    return starts if all(start + count == tokens for start, count in zip(starts, counted, strict=True)) else None
