"""A matrix in the panels of the C++ kernels, and its products.

`native/regauge.h` defines the layout. Activations are rounded to one step a group before they meet the weights: `int8`,
or `int16`, whose error (2⁻¹⁶ of the group's largest) is below bfloat16's; `float32` rounds nothing and is slow.

Legend: O output channels, I input channels, T tokens, N groups along a row, P bytes of panels.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regauge.kernels.cpu.library import library

PANEL = 16
"""Rows of a panel."""
FEW = 16
"""Tokens up to which a product reads codes as it goes; above, whole blocks are decoded or the blocked product runs."""
ACTIVATIONS = {"int8": 0, "int16": 1, "float32": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STEPS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.uint8: 4, torch.float8_e4m3fn: 5}
INT, TABLE, FLOAT, FULL = 0, 1, 2, 3
"""What a code stands for: see `rg_value_kind`."""
META = ("rows", "columns", "bits", "group", "step", "zero", "value", "offset", "mantissa", "bias")


class _Struct(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("panels", "row_scale", "table")] + [
        (name, ctypes.c_int32) for name in META
    ]


@dataclass(frozen=True)
class Value:
    """What codes stand for.

    Attributes:
        kind: INT: code − offset. TABLE: table[code]. FLOAT: sign, exponent and `mantissa` bits, and the exponent less
            `bias`, without infinities.
    """

    kind: int = INT
    offset: int = 0
    table: tuple[float, ...] = ()
    mantissa: int = 0
    bias: int = 0


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed matrix.

    Attributes:
        panels: uint8 (P,), aligned to 64 bytes.
        row_scale_O: float32, a multiplier a row, padded with ones to whole panels; None: 1.
        table: float32 (2^bits,) of `Value.TABLE`; None otherwise.
        meta: the integers of `META`.
    """

    panels: Tensor
    row_scale_O: Tensor | None
    table: Tensor | None
    meta: tuple[int, ...]
    struct: _Struct = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "struct", struct_of(self.panels, self.row_scale_O, self.table, self.meta))

    @property
    def shape(self) -> tuple[int, int]:
        return self.meta[0], self.meta[1]

    @property
    def bits(self) -> int:
        return self.meta[2]

    @property
    def nbytes(self) -> int:
        """Bytes held: panels and row scales."""
        return self.panels.nbytes + (0 if self.row_scale_O is None else self.row_scale_O.nbytes)


def struct_of(panels: Tensor, row_scale_O: Tensor | None, table: Tensor | None, meta: tuple[int, ...]) -> _Struct:
    """The C view of a matrix; its tensors must outlive it."""
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (panels, row_scale_O, table)]
    return _Struct(*pointers, *meta)


def _kernels() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("the C++ kernels are not here; ask regauge.kernels.cpu.library.available() first")
    if found.rg_panel_bytes.restype is not ctypes.c_size_t:
        found.rg_bandwidth.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_double]
        found.rg_bandwidth.restype = ctypes.c_double
        found.rg_panel_bytes.restype = ctypes.c_size_t
    return found


def unit(bits: int) -> int:
    """Inputs in the smallest block of codes; a group is a multiple of it."""
    return 32 if bits & 1 else 16 if bits & 2 else 8 if bits & 4 else 4


def group_of(columns: int, bits: int, span: int) -> int:
    """Inputs a group in panels, where `span` neighbouring inputs share a step; 0 where panels cannot say it.

    A span of whole rows is cut into groups of about 128, and long groups too, because activations are rounded a group
    at a time. The last group may be padded, and padding may cost 3 % of the codes at most where the matrix is large.
    """
    least = unit(bits)
    if span < columns:
        if span % least or columns % span:
            return 0
        return next((size for size in (128, 96, 64) if span > 128 and span % size == 0 and size % least == 0), span)
    sizes = [size for size in range(32, 161, 4) if size % least == 0]
    return min(sizes, key=lambda size: (-columns % size, abs(size - 128)))


def pack(
    codes_OI: Tensor,
    bits: int,
    value: Value,
    group: int,
    scale_ON: Tensor | None,
    zero_ON: Tensor | None = None,
    row_scale_O: Tensor | None = None,
    allocate: Callable[[int], Tensor] | None = None,
) -> Matrix:
    """Panels of codes.

    Args:
        codes_OI: uint8 below 2^bits.
        group: as `group_of` says.
        scale_ON: a step a group in the dtype in which it is kept (`STEPS`; uint8 is 2^(byte − 127)); None: only rows
            have steps.
        zero_ON: uint8 codes that decode to 0; None: `value` is symmetric.
        row_scale_O: float32.
        allocate: bytes → an empty uint8 tensor aligned to 64 bytes; `aligned` by default.
    """
    rows, columns = codes_OI.shape
    scale_ON = None if scale_ON is None else scale_ON.contiguous()
    step = 0 if scale_ON is None else STEPS[scale_ON.dtype]
    meta = (rows, columns, bits, group, step, int(zero_ON is not None), value.kind, value.offset)
    meta += (value.mantissa, value.bias)
    table = torch.tensor(value.table, dtype=torch.float32) if value.kind == TABLE else None
    if table is not None and len(table) < 1 << bits:
        table = torch.cat([table, table.new_zeros((1 << bits) - len(table))])
    groups = math.ceil(columns / group)
    for name, given in (("steps", scale_ON), ("zero points", zero_ON)):
        if given is not None and tuple(given.shape) != (rows, groups):
            raise ValueError(f"{rows} x {columns} in groups of {group} has {rows} x {groups} {name}, not {given.shape}")
    if row_scale_O is not None:
        row_scale_O = torch.nn.functional.pad(row_scale_O.float(), (0, -rows % PANEL), value=1.0).contiguous()
    shape = struct_of(torch.empty(0), None, table, meta)
    need = math.ceil(rows / PANEL) * _kernels().rg_panel_bytes(ctypes.byref(shape))
    if not need:
        raise ValueError(f"panels cannot hold {bits} bits in groups of {group}")
    panels = (allocate or aligned)(need)
    codes_OI, zero_ON = codes_OI.contiguous(), None if zero_ON is None else zero_ON.contiguous()
    refused = _kernels().rg_pack(
        ctypes.byref(shape), *map(_pointer, (codes_OI, scale_ON, zero_ON, panels)), torch.get_num_threads()
    )
    if refused:
        raise ValueError(f"panels cannot hold {bits} bits in groups of {group}")
    return Matrix(panels, row_scale_O, table, meta)


def aligned(size: int) -> Tensor:
    """uint8 (size,), aligned to 64 bytes."""
    memory = torch.empty(size + 63, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def linear(x_TI: Tensor, matrix: Matrix, activations: str = "int16") -> Tensor:
    """x Wᵀ (T, O) in the dtype of x, for any number of tokens; weights are read once for every four of them.

    Args:
        activations: a name of `ACTIVATIONS`. Grids of floats (fp8, fp6) always take float32.
    """
    x_TI = _tokens(x_TI, matrix)
    y_TO = x_TI.new_empty(x_TI.shape[0], matrix.shape[0])
    _done(
        _kernels().rg_linear(
            ctypes.byref(matrix.struct),
            _pointer(x_TI),
            _pointer(y_TO),
            ctypes.c_int64(x_TI.shape[0]),
            DTYPES[x_TI.dtype],
            ACTIVATIONS[activations],
            torch.get_num_threads(),
        )
    )
    return y_TO


def blocked(x_TI: Tensor, matrix: Matrix) -> Tensor:
    """x Wᵀ (T, O) for many tokens, activations rounded to 8 bits a group. Not for grids of floats, nor tables that
    need 16 bits (nf4)."""
    x_TI = _tokens(x_TI, matrix)
    return _gemm(x_TI, None, None, matrix, x_TI.dtype)


def blocked_integers(z_TI: Tensor, scale_T: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """(scale z) Wᵀ (T, O) of ready signed bytes with one float32 step a token; integer sums are exact."""
    return _gemm(None, z_TI.contiguous(), scale_T.float().contiguous(), matrix, dtype)


def _gemm(
    x_TI: Tensor | None, z_TI: Tensor | None, scale_T: Tensor | None, matrix: Matrix, dtype: torch.dtype
) -> Tensor:
    given = x_TI if x_TI is not None else z_TI
    assert given is not None
    y_TO = torch.empty(given.shape[0], matrix.shape[0], dtype=dtype)
    refused = _kernels().rg_gemm(
        ctypes.byref(matrix.struct),
        *map(_pointer, (x_TI, z_TI, scale_T, y_TO)),
        ctypes.c_int64(given.shape[0]),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    _done(refused)
    return y_TO


def integers(z_TI: Tensor, matrix: Matrix) -> Tensor:
    """Exact Σ (code − offset) · z, int32 (T, O), of signed bytes z.

    Raises:
        ValueError: the sums could pass 32 bits, or codes are no integers.
    """
    y_TO = torch.empty(z_TI.shape[0], matrix.shape[0], dtype=torch.int32)
    if z_TI.dtype != torch.int8 or z_TI.shape[1] != matrix.shape[1]:
        raise ValueError(f"signed bytes (T, {matrix.shape[1]}) are wanted, not {z_TI.dtype} {tuple(z_TI.shape)}")
    refused = _kernels().rg_integers(
        ctypes.byref(matrix.struct),
        _pointer(z_TI.contiguous()),
        _pointer(y_TO),
        ctypes.c_int64(z_TI.shape[0]),
        torch.get_num_threads(),
    )
    if refused:
        raise ValueError(f"sums over {matrix.shape[1]} products of {matrix.bits} bits do not fit 32 bits")
    return y_TO


def decode(matrix: Matrix, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Weights of rows [start, stop), computed in float32 and rounded once to `dtype`."""
    return _decode(matrix, start, stop, None, dtype)


def take(matrix: Matrix, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of rows by number (n,)."""
    return _decode(matrix, 0, index.numel(), index.long().contiguous(), dtype)


def _decode(matrix: Matrix, start: int, stop: int, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    out_OI = torch.empty(stop - start, matrix.shape[1], dtype=dtype)
    refused = _kernels().rg_decode(
        ctypes.byref(matrix.struct),
        ctypes.c_int64(start),
        ctypes.c_int64(stop),
        _pointer(index),
        _pointer(out_OI),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    if refused == 2:
        raise IndexError(f"a row was asked for that is not in 0 … {matrix.shape[0] - 1}")
    _done(refused)
    return out_OI


def unpack(matrix: Matrix) -> Tensor:
    """codes_OI, uint8, again."""
    codes_OI = torch.empty(matrix.shape, dtype=torch.uint8)
    _done(_kernels().rg_unpack(ctypes.byref(matrix.struct), _pointer(codes_OI), torch.get_num_threads()))
    return codes_OI


def bandwidth(threads: int, size: int = 512 << 20, seconds: float = 0.1) -> float:
    """GB/s at which `threads` threads read `size` bytes once each, in order: the best of as many passes as fit."""
    return float(_kernels().rg_bandwidth(threads, size, seconds)) / 1e9


def _tokens(x_TI: Tensor, matrix: Matrix) -> Tensor:
    if x_TI.ndim != 2 or x_TI.shape[1] != matrix.shape[1] or x_TI.dtype not in DTYPES:
        raise ValueError(f"(T, {matrix.shape[1]}) floats are wanted, not {x_TI.dtype} {tuple(x_TI.shape)}")
    return x_TI.contiguous()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _done(refused: int) -> None:
    if refused:
        raise MemoryError("the kernels could not have the memory that they work in, or the matrix is unsound")
