"""New tokens through a whole transformer in one call of the C++ kernels, and who keeps the memory of what it reads.

`native/regauge.h` says what every field means. A `Program` is made once for a model; a call brings the embedded tokens,
what the blocks keep of the past, and the positions.

Legend: B sequences, T new tokens of each, H channels of the residual, V rows of the head, K KV heads, C rows that a
store has room for, D head size, O outputs, I inputs, R rank, S rows of a rotary table, P half the channels that turn.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regauge.kernels.cpu.interface import Struct, kernels, struct_of
from regauge.kernels.cpu.matrix import ACTIVATIONS, DTYPES, FULL, Matrix
from regauge.kernels.cpu.structs import (
    TAP_FIELDS,
    CBlock,
    CCall,
    CLowRank,
    CNorm,
    CPacked,
    CProgram,
    CSite,
    CStore,
    CTap,
)

NORMS = {"none": 0, "rms": 1, "layer": 2}
FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
TRANSFORMS = {"identity": 0, "hadamard": 1, "kronecker": 2}
ROUNDINGS = {"plain": 0, "dynamic": 1, "static": 2}
MOST = 64
"""New tokens that one step takes, of all sequences together."""
REFUSALS = {
    2: "the decode step was given matrices or a cache whose shapes do not fit together",
    3: "a cache holds packed keys or values, which the decode step does not read",
    4: "a cache has let go of tokens that attention still reads",
    5: "a cache has no room for the new tokens",
}
"""What `rg_step` answers, as sentences; 0 is done and 1 is no memory."""


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm; `gain` and `bias` are float32 or None."""

    kind: str
    size: int
    eps: float
    gain: Tensor | None = None
    bias: Tensor | None = None

    def struct(self) -> CNorm:
        return CNorm(_address(self.gain), _address(self.bias), NORMS[self.kind], self.size, self.eps)


@dataclass(frozen=True, eq=False)
class Tap:
    """How an activation is read by every site that reads it: times `diagonal_I`, a transform, then codes.

    Attributes:
        transform: of `TRANSFORMS`. `hadamard`: normalised, Sylvester's order, on runs of `size` channels, a power of
            two. `kronecker`: x (left ⊗ right), left (size, size).
        diagonal_I, left, right: float32, contiguous.
        rounding: of `ROUNDINGS`. `dynamic`: the step is reach / ((2^bits − 1) / 2) of `group` channels (0: of a token),
            or of their range where `asymmetric`. `static`: value = step · (code − zero) throughout.
    """

    transform: str = "identity"
    size: int = 0
    diagonal_I: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    rounding: str = "plain"
    bits: int = 8
    group: int = 0
    asymmetric: bool = False
    step: float = 0.0
    zero: float = 0.0

    @property
    def transforms(self) -> bool:
        """Whether sites read something else than the activation, but for its rounding."""
        return self.transform != "identity" or self.diagonal_I is not None

    @property
    def plain(self) -> bool:
        """Whether sites read the activation as it is."""
        return self.rounding == "plain" and not self.transforms

    def same(self, other: Tap) -> bool:
        """Whether both read an activation alike, wherever their tensors lie."""
        one, two = vars(self), vars(other)
        return all(
            found.equal(two[name])
            if isinstance(found, Tensor) and isinstance(two[name], Tensor)
            else found == two[name]
            for name, found in one.items()
        )

    def struct(self) -> CTap:
        addresses = map(_address, (self.diagonal_I, self.left, self.right))
        how = TRANSFORMS[self.transform], self.size, ROUNDINGS[self.rounding], self.bits, self.group
        return CTap(*addresses, *how, int(self.asymmetric), self.step, self.zero)


@dataclass(frozen=True, eq=False)
class Site:
    """A matrix with its bias (float32, or None). A matrix that is not packed is a contiguous (O, I) tensor.

    Attributes:
        activations: how the product carries inputs that the tap does not round, a name of `ACTIVATIONS`.
        low_rank: (left_OR, right_RI), contiguous; what is added is left (right x).
        unrounded: whether this site reads its tap before the rounding.
    """

    matrix: Matrix | Tensor
    bias: Tensor | None = None
    activations: str = "int16"
    low_rank: tuple[Tensor, Tensor] | None = None
    unrounded: bool = False
    _low: list[CLowRank] = field(default_factory=list, repr=False)

    def struct(self) -> CSite:
        inner = self.matrix.struct if isinstance(self.matrix, Matrix) else full(self.matrix)
        low = None
        if self.low_rank is not None:
            self._low[:] = [CLowRank(*map(full, self.low_rank))]
            low = ctypes.pointer(self._low[0])
        return CSite(inner, _address(self.bias), low, ACTIVATIONS[self.activations], int(self.unrounded))


def full(matrix_OI: Tensor) -> Struct:
    """The C view of a matrix in full precision; rows may be further apart than their columns are many."""
    rows, columns = matrix_OI.shape
    meta = (rows, columns, DTYPES[matrix_OI.dtype], columns, 0, 0, FULL, 0, 0, 0)
    if matrix_OI.stride(1) != 1:
        raise ValueError("the columns of a matrix lie side by side")
    return struct_of(matrix_OI, None, None, meta, matrix_OI.stride(0) * matrix_OI.element_size())


@dataclass(frozen=True, eq=False)
class Block:
    """What a block is made of; absent norms and sites are left out, and sizes may differ from block to block.

    Attributes:
        norms, sites: by `structs.NORM_FIELDS` and `structs.SITE_FIELDS`.
        experts: (gate or None, up, down) of each.
        integers: by `structs.INT_FIELDS`; absent: 0.
        scale, softcap: of scores.
        taps: by `structs.TAP_FIELDS`; absent: plain.
    """

    norms: dict[str, Norm]
    sites: dict[str, Site]
    experts: Sequence[tuple[Site | None, Site, Site]] = ()
    integers: dict[str, int] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float = 0.0
    taps: Mapping[str, Tap] = field(default_factory=dict)

    @property
    def cached(self) -> tuple[int, int]:
        """KV heads and head size of its store."""
        return self.integers["kv_heads"], self.integers["head_dim"]


@dataclass(frozen=True, eq=False)
class Store:
    """What one block keeps of the past.

    Attributes:
        keys_BKCD, values_BKCD: a row a token, contiguous, each of its own dtype (float32, bfloat16, float16). The
            caller owns them.
        origin: tokens seen that are held no more: row 0 is token `origin`.
        lengths_BK: int32, rows held of each head; None: tokens seen less `origin`.
        firsts_BK: int32, the first row of each head that counts; None: as the call's `starts` say.
        packed: (keys, values), which no kernel reads yet: a program with them is refused.
    """

    keys_BKCD: Tensor
    values_BKCD: Tensor
    origin: int = 0
    lengths_BK: Tensor | None = None
    firsts_BK: Tensor | None = None
    packed: tuple[CPacked, CPacked] = field(default_factory=lambda: (CPacked(), CPacked()))

    def struct(self) -> CStore:
        tensors = self.keys_BKCD, self.values_BKCD, self.lengths_BK, self.firsts_BK
        dtypes = DTYPES[self.keys_BKCD.dtype], DTYPES[self.values_BKCD.dtype]
        return CStore(*map(_address, tensors), *self.packed, *dtypes, self.keys_BKCD.shape[2], self.origin)


class Program:
    """A model as one call.

    Attributes:
        vocabulary: rows of the head.
        cached: KV heads and head size of each block's store.
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
        self._tables: Sequence[tuple[Tensor, Tensor]] | None = None
        self._stores = (CStore * len(blocks))()
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
        """Where each block keeps its past. The caller owns the memory."""
        for number, store in enumerate(stores):
            self._stores[number] = store.struct()

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
        logits_NV = torch.empty(batch if last else count, self.vocabulary)
        if tables is not self._tables:
            self._tables, self._pointers = tables, self._point(tables)
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
            raise ValueError(REFUSALS[refused])
        return logits_NV

    def _point(self, tables: Sequence[tuple[Tensor, Tensor]]) -> tuple[ctypes.Array[Any], ctypes.Array[Any]]:
        """The addresses of cosines and of sines.

        Raises:
            ValueError: there are not as many tables as the blocks turn by.
        """
        if len(tables) != self._ropes:
            raise ValueError(f"the decode step turns by {self._ropes} tables, not {len(tables)}")
        pointers = ctypes.c_void_p * max(len(tables), 1)
        cosines, sines = (pointers(*(pair[i].data_ptr() for pair in tables)) for i in (0, 1))
        return cosines, sines


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
