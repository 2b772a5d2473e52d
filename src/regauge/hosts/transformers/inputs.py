"""What the native step reads besides weights and cache: embedded tokens, positions, rotary tables, padding.

Legend: B sequences, Q new tokens of each, T tokens with them, H channels of the residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regauge.hosts.transformers.program import (
    PROBED,
    Reads,
    embeddings_of,
    rotary_kinds,
    rotary_module,
    rotary_tables,
)
from regauge.hosts.transformers.skeleton import body_prefix
from regauge.hosts.transformers.tables import table_for
from regauge.kernels.cpu.matrix import Matrix, decode_of
from regauge.runtime.matrices.modules import PackedLookup
from regauge.runtime.step.sites import Unservable

ROWS = 256
"""Least rows of a rotary table; it doubles as texts grow."""


class Inputs:
    """The model's own embeddings and rotary embedding, found once.

    Args:
        reads: takes every attribute that is read.

    Raises:
        Unservable: the family has no step, or rotary embeddings change with the length of the text.
    """

    def __init__(self, model: Any, reads: Reads) -> None:
        table = table_for(model.config).decoding
        if table is None:
            raise Unservable(f"the family table of {model.config.model_type} does not say how it decodes")
        self._table = table
        self._embed = model.get_input_embeddings()
        self._packed, self._factor = _packed(self._embed), embeddings_of(model, table, reads)
        self._places = (
            model.get_submodule(f"{body_prefix(model)}{table.positions}") if table.positions is not None else None
        )
        self._rotary = None if table.rotary is None else rotary_module(model, table, reads)
        self._kinds = rotary_kinds(model.config, table)
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._first = self._probe()

    def widths(self) -> list[int]:
        """Channels of a head that each kind of rotary embedding turns."""
        return [2 * cosines.shape[1] for cosines, _ in self._first]

    def unchanged(self) -> bool:
        """Whether the rotary embedding still gives what its tables hold: its frequencies and its factor can change
        without any mark that they did."""
        now = [tensor for pair in self._probe() for tensor in pair]
        return all(one.equal(other) for one, other in zip(now, (x for pair in self._first for x in pair), strict=True))

    def _probe(self) -> list[tuple[Tensor, Tensor]]:
        return [] if self._rotary is None else rotary_tables(self._rotary, self._kinds, PROBED)

    def embedded(self, ids_BQ: Tensor, positions: list[int]) -> Tensor:
        """(B·Q, H), float32, contiguous, by the model's own modules."""
        ids = ids_BQ.reshape(-1)
        if self._packed is not None and ids.dtype == torch.long:  # past torch's dispatcher, which takes longer than it
            found, dtype = self._packed
            x_NH = decode_of(found.struct, 0, ids.shape[0], ids.contiguous(), dtype).float()
        else:
            x_NH = self._embed(ids_BQ).flatten(0, 1).float()
        if self._factor != 1.0:
            x_NH = x_NH * self._factor
        if self._places is not None:
            rows = torch.tensor(positions, dtype=torch.int64, device="cpu") + self._table.positions_from
            if "matrix" in self._places._modules:
                x_NH = x_NH + self._places.matrix.take(rows).float()
            else:
                x_NH = x_NH + nn.functional.embedding(rows, self._places.weight).float()
        return x_NH.contiguous()

    def positions(self, position_ids: Any, mask: Tensor | None, batch: int, past: int, new: int) -> list[int] | None:
        """The position of each new token, those of one sequence after those of another, as the model's own code takes
        them; None where one is no row of a table."""
        if position_ids is not None:
            if position_ids.ndim != 2 or position_ids.shape[1] != new:
                return None
            found: list[int] = position_ids.flatten().tolist()
            if len(found) == new:
                found = found * batch
            return found if len(found) == batch * new and min(found) >= 0 else None
        if self._table.positions_from and mask is not None:  # opt counts what the mask shows
            counts = mask.count_nonzero(1).tolist()
            return [int(count) - new + j for count in counts for j in range(new)]
        return list(range(past, past + new)) * batch

    def rotary(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """(cosines, sines) of each kind, of at least so many positions: the same list while it suffices."""
        if self._rotary is not None and (not self._tables or self._tables[0][0].shape[0] < rows):
            self._tables = rotary_tables(self._rotary, self._kinds, max(ROWS, 1 << (rows - 1).bit_length()))
        return self._tables


def _packed(module: Any) -> tuple[Matrix, torch.dtype] | None:
    """The table of a plain packed embedding, and the dtype of what it gives."""
    if type(module) is not PackedLookup or len(module.matrix.terms):
        return None
    native = module.matrix.native
    return None if native is None else (native, module.matrix.dtype)
