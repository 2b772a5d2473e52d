"""New tokens through a whole transformer in one call of the C++ kernels, and who keeps the memory of what it reads.

`native/regauge.h` says what every field means. A `Program` is made once for a model; a call brings the embedded tokens,
what the blocks keep of the past, and the positions.

Legend: B sequences, T new tokens of each, H channels of the residual, V rows of the head, K KV heads, C rows that a
store has room for, D head size, O outputs, I inputs, R rank, S rows of a rotary table, P half the channels that turn.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regauge.kernels.cpu import checks
from regauge.kernels.cpu.interface import kernels
from regauge.kernels.cpu.pieces import Block, Norm, Site, Tap
from regauge.kernels.cpu.store import REFUSALS, Store
from regauge.kernels.cpu.structs import (
    TAP_FIELDS,
    CBlock,
    CCall,
    CProgram,
    CSite,
    CStore,
)

MOST = 64
"""New tokens that one step takes, of all sequences together."""


class Program:
    """A model as one call.

    Attributes:
        vocabulary: rows of the head.
        cached: KV heads and head size of each block's store.

    Raises:
        ValueError: sizes are no integers of 32 bits, or the last tap does not fit the head.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        norm: Norm,
        head: Site,
        hidden: int,
        ropes: int,
        head_softcap: float,
        head_in: Tap | None = None,
    ) -> None:
        head_in = head_in or Tap()
        head_in.check(head.matrix.shape[1])
        checks.integers("sizes of a program", (hidden, ropes), 0)
        self._keep: list[object] = [blocks, norm, head, head_in]
        self._blocks = (CBlock * len(blocks))()
        for place, block in zip(self._blocks, blocks, strict=True):
            self._fill(place, block)
        self._program = CProgram(
            self._blocks, norm.struct(), head_in.struct(), head.struct(), len(blocks), hidden, ropes, head_softcap
        )
        self.vocabulary = head.matrix.shape[0]
        self.cached = [block.cached for block in blocks]
        self._ropes = ropes
        self._hidden, self._batch = hidden, 0
        self._turned = [(block.integers.get("rope", 0), block.integers.get("rotary", 0)) for block in blocks]
        self._tables: Sequence[tuple[Tensor, Tensor]] | None = None
        self._held: tuple[tuple[Tensor, Tensor], ...] = ()
        self._stores = (CStore * len(blocks))()
        self._kept: tuple[Store, ...] = ()
        self._lengths = ctypes.c_int32 * len(blocks)
        self._run = kernels().rg_step

    def _fill(self, place: CBlock, block: Block) -> None:
        taps = {name: block.taps.get(name, Tap()) for name in TAP_FIELDS}
        for parts in (block.norms, taps, block.sites):
            for name, part in parts.items():
                setattr(place, name, part.struct())
        for name, number in block.integers.items():
            setattr(place, name, number)
        place.scale, place.softcap = block.scale, block.softcap
        if block.experts:
            experts = (CSite * (3 * len(block.experts)))()
            for index, sites in enumerate(block.experts):
                for part_index, site in enumerate(sites):
                    if site is not None:
                        experts[3 * index + part_index] = site.struct()
            place.experts = experts
            self._keep.append(experts)

    def keep(self, stores: Sequence[Store]) -> None:
        """Where each block keeps its past. The program holds on to the stores, so their memory stays.

        Raises:
            ValueError: they are not one for each block, of its heads and of as many sequences.
        """
        sizes = [(store.keys_BKCD.shape[1], store.keys_BKCD.shape[3]) for store in stores]
        batches = {store.keys_BKCD.shape[0] for store in stores}
        if sizes != self.cached or len(batches) > 1:
            raise ValueError(f"stores of heads {sizes} and {sorted(batches)} sequences for blocks of {self.cached}")
        self._batch = batches.pop() if batches else 0
        for number, store in enumerate(stores):
            self._stores[number] = store.struct()
        self._kept = tuple(stores)

    def __call__(
        self,
        x_NH: Tensor,
        positions: Sequence[int],
        starts: Sequence[int],
        tables: Sequence[tuple[Tensor, Tensor]],
        lengths: Sequence[int],
        last: bool = False,
    ) -> Tensor:
        """Logits (B·T, V), float32, of the new tokens, whose keys and values are written behind those in the stores.

        Args:
            x_NH: embedded tokens, float32, N = B·T: those of one sequence after those of another.
            positions: row of the rotary tables of each.
            starts: first token seen of each sequence that counts.
            tables: (cosines, sines), float32 (S, P) each, of every kind of rotary embedding.
            lengths: tokens seen before these, by each block.
            last: logits of each sequence's last token alone, (B, V).

        Raises:
            ValueError: the step cannot read what it was given; the sentence says why.
        """
        batch, count = len(starts), x_NH.shape[0]
        if tables is not self._tables:
            self._tables, self._pointers = None, self._point(tables)
            self._tables = tables
        self._check(x_NH, positions, starts, lengths)
        logits_NV = torch.empty(batch if last else count, self.vocabulary, dtype=torch.float32, device="cpu")
        call = CCall(
            x_NH.data_ptr(),
            logits_NV.data_ptr(),
            (ctypes.c_int32 * count)(*positions),
            (ctypes.c_int32 * batch)(*starts),
            *self._pointers,
            self._stores,
            self._lengths(*lengths),
            batch,
            count // batch,
            int(last),
        )
        refused = self._run(ctypes.byref(self._program), ctypes.byref(call), torch.get_num_threads())
        if refused == 1:
            raise MemoryError("the decode step could not have the memory that it works in")
        if refused:
            raise ValueError(REFUSALS[refused].format("decode step"))
        return logits_NV

    def _check(self, x_NH: Tensor, positions: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> None:
        batch, count = len(starts), x_NH.shape[0]
        checks.tensor("embedded tokens", x_NH, (torch.float32,), (None, self._hidden))
        if not batch or not count or count % batch or len(positions) != count or len(lengths) != len(self.cached):
            raise ValueError(
                f"{count} tokens of {batch} sequences come with {len(positions)} positions, and the lengths of "
                f"{len(lengths)} of {len(self.cached)} blocks"
            )
        if self.cached and batch != self._batch:
            raise ValueError(f"{batch} sequences come to stores of {self._batch}")
        checks.integers("positions", positions, 0, self._positions)
        checks.integers("first tokens", starts, 0)
        checks.integers("lengths", lengths, 0)

    def _point(self, tables: Sequence[tuple[Tensor, Tensor]]) -> tuple[ctypes.Array[Any], ctypes.Array[Any]]:
        """The addresses of cosines and of sines.

        Raises:
            ValueError: there are not as many tables as the blocks turn by, or they are of other channels.
        """
        if len(tables) != self._ropes:
            raise ValueError(f"the decode step turns by {self._ropes} tables, not {len(tables)}")
        for cosines_SP, sines_SP in tables:
            checks.tensor("cosines", cosines_SP, (torch.float32,), (None, None))
            checks.tensor("sines", sines_SP, (torch.float32,), tuple(cosines_SP.shape))
        for rope, rotary in self._turned:
            if rotary and not (0 <= rope < len(tables) and 2 * tables[rope][0].shape[1] == rotary):
                raise ValueError(f"a block turns {rotary} channels by table {rope}, which is not of so many")
        self._held = tuple(tables)
        self._positions = min((cosines_SP.shape[0] for cosines_SP, _ in tables), default=checks.INT32)
        pointers = ctypes.c_void_p * max(len(tables), 1)
        cosines, sines = (pointers(*(pair[i].data_ptr() for pair in tables)) for i in (0, 1))
        return cosines, sines
