"""How a step is stored: its own dtype, a power of two, or two levels.

Laws: `store` returns finite positive steps and fields that `load` turns into the same steps, bit for bit; storing a
stored step changes nothing. A step of 0 (a group of zeros) is stored as 1 where that costs nothing.

Legend: G groups, R rows of the matrix; groups are numbered row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.base import Grid, Scale
from regauge.kernels.cpu.sweep import BF16, E4M3, E8M0, F16, F32, Stored

Fields = dict[str, Tensor]
UNPACKED: Mapping[str, int] = {}


def filled(scale_G1: Tensor) -> Tensor:
    """float32, with 1 in place of 0."""
    scale_G1 = scale_G1.float()
    return torch.where(scale_G1 > 0, scale_G1, torch.ones_like(scale_G1))


_KINDS = {torch.float16: F16, torch.bfloat16: BF16, torch.float32: F32}


@dataclass(frozen=True)
class Cast:
    """The step in a float dtype. Underflow takes the least normal value, overflow the greatest.

    Attributes:
        signed: whether a step may be negative, which turns the grid round: its further end then lies up.
    """

    name: str
    dtype: torch.dtype
    signed: bool = False
    shared: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    loose: ClassVar[None] = None
    low: ClassVar[None] = None
    packed: ClassVar[Mapping[str, int]] = UNPACKED

    @property
    def kernel(self) -> Stored | None:
        return Stored(_KINDS[self.dtype]) if self.dtype in _KINDS and not self.signed else None

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        return self

    def bytes(self, groups: int, rows: int = 1) -> int:
        return groups * self.dtype.itemsize

    def store(self, scale_G1: Tensor) -> tuple[Tensor, Fields]:
        limits = torch.finfo(self.dtype)
        size_G1 = scale_G1.abs() if self.signed else scale_G1
        stored = filled(size_G1).clamp(limits.tiny, limits.max).to(self.dtype)
        if self.signed:
            stored = torch.where(scale_G1 < 0, -stored, stored)
        return stored.float(), {"scale": stored}

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        return fields["scale"].float()


def Float32() -> Cast:
    """The step in float32."""
    return Cast("f32", torch.float32)


def Float16() -> Cast:
    """The step in float16."""
    return Cast("f16", torch.float16)


def Float16Signed() -> Cast:
    """The step in float16, with a sign."""
    return Cast("f16-signed", torch.float16, signed=True)


def BFloat16() -> Cast:
    """The step in bfloat16."""
    return Cast("bf16", torch.bfloat16)


def _floor_log2(x: Tensor) -> Tensor:
    """floor(log2 x) of positive finite x, int32, exact."""
    return torch.frexp(x).exponent - 1


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, float32, exact for −126 … 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _ceil(x: Tensor, exponent: Tensor) -> Tensor:
    """1 where x is above 2^exponent, else 0."""
    return (x > torch.exp2(exponent.double())).to(exponent.dtype)


def _bytes_of(exponent: Tensor) -> Tensor:
    return (exponent + 127).to(torch.uint8)


def _load_power(fields: Mapping[str, Tensor]) -> Tensor:
    return _power(fields["scale"].to(torch.int32) - 127)


@dataclass(frozen=True)
class PowerOfTwo:
    """The step is a power of two in one byte: E8M0, 2^(byte − 127), bytes 1 … 254 (MX formats, arXiv 2310.10537).

    The exponent is that of the group's largest magnitude less that of the grid's greatest value, floor(log2 a) − emax.
    Where a would round past the grid (beyond the middle between its greatest value and the next power of two: 7 for
    e2m1) one more is taken, as compressed-tensors does; with `strict` it is not, as the MX specification says.

    Differs: for e4m3 compressed-tensors takes one more from 1.75 · 2^k on, we from 1.875 · 2^k. A byte of 0 (2^−127, a
    subnormal float32) is not used.

    Attributes:
        top: greatest value of the grid over the power of two below it, set by `bind`; 1.5 for e2m1.
    """

    strict: bool = False
    top: float = 0.0
    name: ClassVar[str] = "e8m0"
    shared: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    loose: ClassVar[None] = None
    signed: ClassVar[bool] = False
    low: ClassVar[None] = None
    packed: ClassVar[Mapping[str, int]] = UNPACKED

    @property
    def kernel(self) -> Stored | None:
        return Stored(E8M0, top=self.top, strict=self.strict) if self.top else None

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        return replace(self, top=grid.high / 2.0 ** math.floor(math.log2(grid.high)))

    def bytes(self, groups: int, rows: int = 1) -> int:
        return groups

    def store(self, scale_G1: Tensor) -> tuple[Tensor, Fields]:
        if not self.top:
            raise ValueError("a power of two is chosen for a grid: bind it first")
        # A step is a / high in float32; the margin of 2^−21 undoes its rounding where a is a 16-bit float.
        peak_G1 = filled(scale_G1).clamp(2.0**-126, 2.0**126).double() * (self.top * (1 + 2.0**-21))
        exponent = _floor_log2(peak_G1)
        if not self.strict:
            exponent += (peak_G1 >= (self.top + 2) / 2 * torch.exp2(exponent.double())).to(exponent.dtype)
        exponent = exponent.clamp(-126, 127)
        return _power(exponent), {"scale": _bytes_of(exponent)}

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        return _load_power(fields)


@dataclass(frozen=True)
class M1:
    """The step rounded up to a power of two, one byte (ZeroQuant-FP, arXiv 2307.09782, M1): nothing is clipped."""

    name: ClassVar[str] = "m1"
    shared: ClassVar[bool] = False
    fused: ClassVar[bool] = False
    loose: ClassVar[None] = None
    signed: ClassVar[bool] = False
    low: ClassVar[None] = None
    packed: ClassVar[Mapping[str, int]] = UNPACKED

    @property
    def kernel(self) -> Stored | None:
        return None

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        return self

    def bytes(self, groups: int, rows: int = 1) -> int:
        return groups

    def store(self, scale_G1: Tensor) -> tuple[Tensor, Fields]:
        step_G1 = filled(scale_G1).clamp(2.0**-126, 2.0**127).double()
        exponent = _floor_log2(step_G1)
        exponent = (exponent + _ceil(step_G1, exponent)).clamp(-126, 127)
        return _power(exponent), {"scale": _bytes_of(exponent)}

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        return _load_power(fields)


@dataclass(frozen=True, eq=False)
class M2:
    """Steps tied to the largest of their row by 2^−n (ZeroQuant-FP, arXiv 2307.09782, M2).

    S_i → S_max · 2^−n with n = floor(log2(S_max / S_i)), so a step never shrinks and nothing is clipped; n ≤ 8, so that
    an FP4 value times 2^−n is exact in e4m3 and the row becomes FP8 with the one step S_max.

    Differs: the direction of rounding and the cap are ours to fix; the publication ties "one or more rows".

    Attributes:
        row_R1: S_max of each row, float32, set by `bind`.
    """

    row_R1: Tensor | None = None
    name: ClassVar[str] = "m2"
    shared: ClassVar[bool] = True
    fused: ClassVar[bool] = False
    loose: ClassVar[None] = None
    signed: ClassVar[bool] = False
    low: ClassVar[None] = None
    packed: ClassVar[Mapping[str, int]] = UNPACKED

    @property
    def kernel(self) -> Stored | None:
        return None

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        if self.row_R1 is not None:
            return self
        rows = rows if scale_G1.shape[0] % rows == 0 else 1
        largest_R1 = scale_G1.float().view(rows, -1).amax(1, keepdim=True)
        return M2(filled(largest_R1).clamp(2.0**-110, 2.0**126))

    def bytes(self, groups: int, rows: int = 1) -> int:
        return groups + 4 * (rows if groups % rows == 0 else 1)

    def store(self, scale_G1: Tensor) -> tuple[Tensor, Fields]:
        if self.row_R1 is None:
            raise ValueError("M2 ties steps to the largest of their row: bind it first")
        step_RN = scale_G1.float().view(self.row_R1.shape[0], -1).clamp(min=2.0**-126)
        # The margin undoes the rounding of the quotient, so that storing a stored step changes nothing.
        n_RN = _floor_log2((self.row_R1 / step_RN).double() * (1 + 2.0**-21)).clamp(0, 8)
        fields = {"scale": n_RN.to(torch.uint8).view(-1, 1), "row_scale": self.row_R1}
        return self.load(fields), fields

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        row_R1 = fields["row_scale"]
        return (row_R1 * _power(-fields["scale"].to(torch.int32)).view(row_R1.shape[0], -1)).view(-1, 1)


@dataclass(frozen=True, eq=False)
class TwoLevel:
    """The step in e4m3 under one float32 for the matrix (NVFP4): step = e4m3 / global_scale, as compressed-tensors
    stores it. `global_scale` brings the largest step to 448, the top of e4m3. Runtimes that fuse q, k and v, or gate
    and up, take the largest of their globals for all, so those matrices are given one (`engine/block.py`).

    Attributes:
        global_1: float32 (1,), set by `bind`.
    """

    global_1: Tensor | None = None
    name: ClassVar[str] = "nv"
    shared: ClassVar[bool] = True
    fused: ClassVar[bool] = True
    loose: ClassVar[None] = None
    signed: ClassVar[bool] = False
    low: ClassVar[None] = None
    packed: ClassVar[Mapping[str, int]] = UNPACKED

    @property
    def kernel(self) -> Stored | None:
        return None if self.global_1 is None else Stored(E4M3, whole=float(self.global_1))

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        if self.global_1 is not None:
            return self
        largest = float(scale_G1.max())
        if largest <= 0:
            return TwoLevel(torch.ones(1, dtype=torch.float32, device="cpu"))
        # 448 · high / absmax, in float32 and in this order, is compressed-tensors' figure to the bit.
        peak = torch.tensor([largest], dtype=torch.float32, device="cpu") * grid.high
        return TwoLevel((448.0 * grid.high / peak).clamp(2.0**-100, 2.0**110))

    def bytes(self, groups: int, rows: int = 1) -> int:
        return groups + 4

    def store(self, scale_G1: Tensor) -> tuple[Tensor, Fields]:
        if self.global_1 is None:
            raise ValueError("a two-level scale has one global step for the matrix: bind it first")
        level = (scale_G1.float() * self.global_1.to(scale_G1.device)).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
        fields = {"scale": level, "global_scale": self.global_1}
        return self.load(fields), fields

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        return fields["scale"].float() / fields["global_scale"].to(fields["scale"].device)
