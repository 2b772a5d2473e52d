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

from regauge.kernels.cpu.interface import META, Struct, kernels, struct_of
from regauge.kernels.cpu.layout import (
    FLOAT,
    FULL,
    INT,
    PANEL,
    STEPS,
    TABLE,
    Value,
    aligned,
    group_of,
    meta_of,
    panel_bytes,
    unit,
)

_Struct, _kernels = Struct, kernels

__all__ = [
    "FLOAT",
    "FULL",
    "INT",
    "META",
    "PANEL",
    "STEPS",
    "TABLE",
    "Matrix",
    "Value",
    "aligned",
    "group_of",
    "struct_of",
    "unit",
]

FEW = 16
"""Tokens up to which a product reads codes as it goes; above, whole blocks are decoded or the blocked product runs."""
ONCE = 4
"""Tokens up to which it reads them once."""
ACTIVATIONS = {"int8": 0, "int16": 1, "float32": 2}
TOKEN = 16
"""One step a token instead of one a group: this plus the bits."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed matrix.

    Attributes:
        panels: uint8 (P,), aligned to 64 bytes.
        row_scale_O: float32, a multiplier a row, padded with ones to whole panels; None: 1.
        table: float32 (2^bits,) of `Value.TABLE`; None otherwise.
        meta: the integers of `META`.
        stride: bytes from panel to panel where this is the first rows and inputs of a larger matrix; 0: it is whole.
    """

    panels: Tensor
    row_scale_O: Tensor | None
    table: Tensor | None
    meta: tuple[int, ...]
    stride: int = 0
    struct: Struct = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "struct", struct_of(self.panels, self.row_scale_O, self.table, self.meta, self.stride))

    @property
    def shape(self) -> tuple[int, int]:
        return self.meta[0], self.meta[1]

    @property
    def bits(self) -> int:
        return self.meta[2]

    def prefix(self, rows: int, columns: int) -> Matrix:
        """The first rows and inputs, as a view of the same panels.

        Raises:
            ValueError: there are not so many.
        """
        if not (0 < rows <= self.shape[0] and 0 < columns <= self.shape[1]):
            raise ValueError(
                f"the first {rows} x {columns} of a matrix of {self.shape[0]} x {self.shape[1]} do not exist"
            )
        stride = int(kernels().rg_panel_bytes(ctypes.byref(self.struct)))
        return Matrix(self.panels, self.row_scale_O, self.table, (rows, columns, *self.meta[2:]), stride)

    @property
    def nbytes(self) -> int:
        """Bytes held: panels and row scales."""
        return self.panels.nbytes + (0 if self.row_scale_O is None else self.row_scale_O.nbytes)


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
    meta = meta_of((rows, columns), bits, value, group, scale_ON, zero_ON is not None)
    table = torch.tensor(value.table, dtype=torch.float32, device="cpu") if value.kind == TABLE else None
    if table is not None and len(table) < 1 << bits:
        table = torch.cat([table, table.new_zeros((1 << bits) - len(table))])
    groups = math.ceil(columns / group)
    for name, given in (("steps", scale_ON), ("zero points", zero_ON)):
        if given is not None and tuple(given.shape) != (rows, groups):
            raise ValueError(f"{rows} x {columns} in groups of {group} has {rows} x {groups} {name}, not {given.shape}")
    if row_scale_O is not None:
        row_scale_O = torch.nn.functional.pad(row_scale_O.float(), (0, -rows % PANEL), value=1.0).contiguous()
    need = panel_bytes(meta)
    if not need:
        raise ValueError(f"panels cannot hold {bits} bits in groups of {group}")
    panels = (allocate or aligned)(need)
    codes_OI, zero_ON = codes_OI.contiguous(), None if zero_ON is None else zero_ON.contiguous()
    matrix = Matrix(panels, row_scale_O, table, meta)
    pointers = map(_pointer, (codes_OI, scale_ON, zero_ON, panels))
    if kernels().rg_pack(ctypes.byref(matrix.struct), *pointers, torch.get_num_threads()):
        raise ValueError(f"panels cannot hold {bits} bits in groups of {group}")
    return matrix


def linear(x_TI: Tensor, matrix: Matrix, activations: str = "int16") -> Tensor:
    """x Wᵀ (T, O) in the dtype of x, for any number of tokens; weights are read once for every four of them.

    Args:
        activations: a name of `ACTIVATIONS`. Grids of floats (fp8, fp6) always take float32.
    """
    return linear_of(x_TI, matrix.struct, ACTIVATIONS[activations])


def linear_of(x_TI: Tensor, struct: Struct, activations: int) -> Tensor:
    """`linear` by a C view."""
    x_TI = _tokens(x_TI, struct.columns)
    y_TO = x_TI.new_empty(x_TI.shape[0], struct.rows)
    _done(
        kernels().rg_linear(
            ctypes.byref(struct),
            x_TI.data_ptr(),
            y_TO.data_ptr(),
            x_TI.shape[0],
            DTYPES[x_TI.dtype],
            activations,
            torch.get_num_threads(),
        )
    )
    return y_TO


def blocked(x_TI: Tensor, matrix: Matrix) -> Tensor:
    """x Wᵀ (T, O) for many tokens, activations rounded to 8 bits a group. Not for grids of floats, nor tables that
    need 16 bits (nf4)."""
    return blocked_of(x_TI, matrix.struct)


def blocked_of(x_TI: Tensor, struct: Struct) -> Tensor:
    """`blocked` by a C view."""
    x_TI = _tokens(x_TI, struct.columns)
    return _gemm(x_TI, None, None, struct, x_TI.dtype)


def blocked_integers(z_TI: Tensor, scale_T: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """(scale z) Wᵀ (T, O) of ready signed bytes with one float32 step a token; integer sums are exact."""
    return blocked_integers_of(z_TI, scale_T, matrix.struct, dtype)


def blocked_integers_of(z_TI: Tensor, scale_T: Tensor, struct: Struct, dtype: torch.dtype) -> Tensor:
    """`blocked_integers` by a C view."""
    _signed(z_TI, struct.columns)
    if scale_T.shape != z_TI.shape[:1]:
        raise ValueError(f"{z_TI.shape[0]} tokens have as many steps, not {tuple(scale_T.shape)}")
    return _gemm(None, z_TI.contiguous(), scale_T.float().contiguous(), struct, dtype)


def _gemm(
    x_TI: Tensor | None, z_TI: Tensor | None, scale_T: Tensor | None, struct: Struct, dtype: torch.dtype
) -> Tensor:
    given = x_TI if x_TI is not None else z_TI
    assert given is not None
    y_TO = torch.empty(given.shape[0], struct.rows, dtype=dtype, device="cpu")
    pointers = map(_pointer, (x_TI, z_TI, scale_T, y_TO))
    refused = kernels().rg_gemm(ctypes.byref(struct), *pointers, given.shape[0], DTYPES[dtype], torch.get_num_threads())
    _done(refused)
    return y_TO


def integers(z_TI: Tensor, matrix: Matrix) -> Tensor:
    """Exact Σ (code − offset) · z, int32 (T, O), of signed bytes z.

    Raises:
        ValueError: the sums could pass 32 bits, or codes are no integers.
    """
    y_TO = torch.empty(z_TI.shape[0], matrix.shape[0], dtype=torch.int32, device="cpu")
    _signed(z_TI, matrix.shape[1])
    z_TI = z_TI.contiguous()
    refused = kernels().rg_integers(
        ctypes.byref(matrix.struct), z_TI.data_ptr(), y_TO.data_ptr(), z_TI.shape[0], torch.get_num_threads()
    )
    if refused:
        raise ValueError(f"sums over {matrix.shape[1]} products of {matrix.bits} bits do not fit 32 bits")
    return y_TO


def decode(matrix: Matrix, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Weights of rows [start, stop), computed in float32 and rounded once to `dtype`."""
    return decode_of(matrix.struct, start, stop, None, dtype)


def take(matrix: Matrix, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of rows by number (n,).

    Raises:
        IndexError: there is no such row.
    """
    return decode_of(matrix.struct, 0, index.numel(), index.long().contiguous(), dtype)


def decode_of(struct: Struct, start: int, stop: int, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`decode`, or `take` where there is an index, by a C view."""
    out_OI = torch.empty(max(stop - start, 0), struct.columns, dtype=dtype, device="cpu")
    refused = kernels().rg_decode(
        ctypes.byref(struct), start, stop, _pointer(index), out_OI.data_ptr(), DTYPES[dtype], torch.get_num_threads()
    )
    if refused == 2:
        raise IndexError(f"a row was asked for that is not in 0 … {struct.rows - 1}")
    _done(refused)
    return out_OI


def unpack(matrix: Matrix) -> Tensor:
    """codes_OI, uint8, again."""
    codes_OI = torch.empty(matrix.shape, dtype=torch.uint8, device="cpu")
    _done(kernels().rg_unpack(ctypes.byref(matrix.struct), codes_OI.data_ptr(), torch.get_num_threads()))
    return codes_OI


def _tokens(x_TI: Tensor, columns: int) -> Tensor:
    if x_TI.ndim != 2 or x_TI.shape[1] != columns or x_TI.dtype not in DTYPES:
        raise ValueError(f"(T, {columns}) floats are wanted, not {x_TI.dtype} {tuple(x_TI.shape)}")
    return x_TI.contiguous()


def _signed(z_TI: Tensor, columns: int) -> None:
    if z_TI.dtype != torch.int8 or z_TI.ndim != 2 or z_TI.shape[1] != columns:
        raise ValueError(f"signed bytes (T, {columns}) are wanted, not {z_TI.dtype} {tuple(z_TI.shape)}")


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _done(refused: int) -> None:
    if refused:
        raise MemoryError("the kernels could not have the memory that they work in, or the matrix is unsound")
