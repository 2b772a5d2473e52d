"""One token through a whole transformer in one call of the C++ kernels: the C structures, and who keeps their memory.

`native/regauge.h` says what every field means. A `Program` is made once for a model; a call brings the embedded tokens,
the cache and the positions.

Legend: B sequences, H channels of the residual, V rows of the head, S rows of a rotary table, R half the channels that
turn.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regauge.kernels.cpu.interface import Struct, kernels, struct_of
from regauge.kernels.cpu.matrix import ACTIVATIONS, DTYPES, FULL, TOKEN, Matrix

NORMS = {"none": 0, "rms": 1, "layer": 2}
FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
MOST = 64
"""Sequences that one step takes."""


class _Norm(ctypes.Structure):
    _fields_ = [
        ("gain", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("eps", ctypes.c_float),
    ]


class _Site(ctypes.Structure):
    _fields_ = [("matrix", Struct), ("bias", ctypes.c_void_p), ("activations", ctypes.c_int32)]


_NORM_FIELDS = ("attn_norm", "q_norm", "k_norm", "attn_post", "mlp_norm", "mlp_post")
_SITE_FIELDS = ("q", "k", "v", "o", "gate", "up", "down", "router")
_INT_FIELDS: tuple[str, ...] = ("expert_count", "experts_used", "normalise", "heads", "kv_heads", "head_dim")
_INT_FIELDS += ("rotary", "interleaved", "rope", "parallel", "activation", "window")


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in _NORM_FIELDS),
        *((name, _Site) for name in _SITE_FIELDS),
        ("experts", ctypes.POINTER(_Site)),
        *((name, ctypes.c_int32) for name in _INT_FIELDS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class _Program(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.POINTER(_Block)),
        ("norm", _Norm),
        ("head", _Site),
        ("block_count", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("rope_count", ctypes.c_int32),
        ("head_softcap", ctypes.c_float),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("starts", ctypes.POINTER(ctypes.c_int32)),
        ("cosines", ctypes.POINTER(ctypes.c_void_p)),
        ("sines", ctypes.POINTER(ctypes.c_void_p)),
        ("batch", ctypes.c_int32),
        ("past", ctypes.c_int32),
        ("capacity", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm; `gain` and `bias` are float32 or None."""

    kind: str
    size: int
    eps: float
    gain: Tensor | None = None
    bias: Tensor | None = None

    def struct(self) -> _Norm:
        return _Norm(_address(self.gain), _address(self.bias), NORMS[self.kind], self.size, self.eps)


@dataclass(frozen=True, eq=False)
class Site:
    """A matrix with its bias (float32, or None). A matrix that is not packed is a contiguous (O, I) tensor.

    Attributes:
        activations: a name of `ACTIVATIONS`, or `token8` (2 ... 8): one step a token and so many signed bits.
    """

    matrix: Matrix | Tensor
    bias: Tensor | None = None
    activations: str = "int16"

    def struct(self) -> _Site:
        if isinstance(self.matrix, Matrix):
            inner = self.matrix.struct
        else:
            rows, columns = self.matrix.shape
            inner = struct_of(
                self.matrix, None, None, (rows, columns, DTYPES[self.matrix.dtype], columns, 0, 0, FULL, 0, 0, 0)
            )
        bits = self.activations.removeprefix("token")
        rounding = TOKEN + int(bits) if bits.isdigit() else ACTIVATIONS[self.activations]
        return _Site(inner, _address(self.bias), rounding)


@dataclass(frozen=True, eq=False)
class Block:
    """What a block is made of; absent norms and sites are left out.

    Attributes:
        norms: by `_NORM_FIELDS`.
        sites: by `_SITE_FIELDS`.
        experts: (gate or None, up, down) of each.
        integers: by `_INT_FIELDS`; absent: 0.
        scale, softcap: of scores.
    """

    norms: dict[str, Norm]
    sites: dict[str, Site]
    experts: Sequence[tuple[Site | None, Site, Site]] = ()
    integers: dict[str, int] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float = 0.0


class Program:
    """A model as one call.

    Attributes:
        vocabulary: rows of the head.
        cached: KV heads and head size of every block's cache; None where blocks differ.
    """

    def __init__(
        self, blocks: Sequence[Block], norm: Norm, head: Site, hidden: int, ropes: int, head_softcap: float
    ) -> None:
        self._keep: list[object] = [blocks, norm, head]
        self._blocks = (_Block * len(blocks))()
        for place, block in zip(self._blocks, blocks, strict=True):
            for parts in (block.norms, block.sites):
                for name, part in parts.items():
                    setattr(place, name, part.struct())
            for name, number in block.integers.items():
                setattr(place, name, number)
            place.scale, place.softcap = block.scale, block.softcap
            if block.experts:
                experts = (_Site * (3 * len(block.experts)))()
                for index, sites in enumerate(block.experts):
                    for part_index, site in enumerate(sites):
                        if site is not None:
                            experts[3 * index + part_index] = site.struct()
                place.experts = experts
                self._keep.append(experts)
        self._program = _Program(self._blocks, norm.struct(), head.struct(), len(blocks), hidden, ropes, head_softcap)
        self.vocabulary = head.matrix.shape[0]
        caches = {(block.integers["kv_heads"], block.integers["head_dim"]) for block in blocks}
        self.cached = caches.pop() if len(caches) == 1 else None
        self._ropes = ropes
        self._tables: Sequence[tuple[Tensor, Tensor]] | None = None
        self._run = kernels().rg_step

    def caches(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Where each block keeps its cache: (B, KV heads, capacity, head size), contiguous. The caller owns them."""
        for block, key, value in zip(self._blocks, keys, values, strict=True):
            block.keys, block.values = key.data_ptr(), value.data_ptr()

    def __call__(
        self,
        x_BH: Tensor,
        positions: Sequence[int],
        starts: Sequence[int],
        tables: Sequence[tuple[Tensor, Tensor]],
        past: int,
        capacity: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Logits (B, V), float32, of one new token of each sequence, whose keys and values are cached at `past`.

        Args:
            x_BH: embedded tokens, float32.
            positions: row of the rotary tables of each sequence.
            starts: first cached token of each sequence that counts.
            tables: (cosines, sines), float32 (S, R) each, of every kind of rotary embedding.
            past: tokens cached before this one; the cache has room for `capacity`.
            dtype: of the cache.
        """
        batch = x_BH.shape[0]
        logits_BV = torch.empty(batch, self.vocabulary)
        integers = ctypes.c_int32 * batch
        if tables is not self._tables:
            self._tables, self._pointers = tables, self._point(tables)
        call = _Call(
            x_BH.data_ptr(),
            logits_BV.data_ptr(),
            integers(*positions),
            integers(*starts),
            *self._pointers,
            batch,
            past,
            capacity,
            DTYPES[dtype],
        )
        refused = self._run(ctypes.byref(self._program), ctypes.byref(call), torch.get_num_threads())
        if refused == 1:
            raise MemoryError("the decode step could not have the memory that it works in")
        if refused:
            raise ValueError("the decode step was given matrices or a cache whose shapes do not fit together")
        return logits_BV

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
