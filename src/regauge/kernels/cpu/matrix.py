"""A matrix in the panels of the C++ kernels, and its products.

`native/regauge.h` defines the layout. Activations are rounded to one step a group before they meet the weights: `int8`,
or `int16`, whose error (2⁻¹⁶ of the group's largest) is below bfloat16's; `float32` rounds nothing and is slow.

Legend: O output channels, I input channels, T tokens, N groups along a row, P bytes of panels.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regauge.kernels.cpu import checks
from regauge.kernels.cpu.checks import DTYPES, number
from regauge.kernels.cpu.interface import META, PANEL, Struct, kernels, planes, struct_of
from regauge.kernels.cpu.layout import (
    FLOAT,
    FULL,
    INT,
    STEPS,
    TABLE,
    TRELLIS,
    Value,
    aligned,
    meta_of,
    panel_bytes,
    stride_of,
)

__all__ = [
    "DTYPES",
    "FLOAT",
    "FULL",
    "INT",
    "META",
    "PANEL",
    "STEPS",
    "TABLE",
    "TRELLIS",
    "Matrix",
    "Value",
]

FEW = 16
"""Tokens up to which a product reads codes as it goes; above, whole blocks are decoded or the blocked product runs."""
ONCE = 4
"""Tokens up to which it reads them once."""
ACTIVATIONS = {"int8": 0, "int16": 1, "float32": 2}
TOKEN = 16
"""One step a token instead of one a group: this plus the bits."""
NO_MEMORY, NO_ROW = 1, 6
"""Of what the library answers (`rg_answer`); 0 is done."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed matrix.

    Attributes:
        panels: uint8 (P,), aligned to 64 bytes.
        row_scale_O: float32, a multiplier a row, padded with ones to whole panels; None: 1.
        table: float32 (2^bits,) of `Value.TABLE`, of a trellis 129 numbers; None otherwise.
        meta: the integers of `META`.
        stride: of a larger matrix's first rows and inputs, bytes from panel to panel (in planes its panels); 0: whole;
            below 0: in runs, of which it may be the first (`layout.stride_of`).
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
        """The first rows and inputs, as a view of the same panels. A ValueError: there are not so many."""
        if not (0 < rows <= self.shape[0] and 0 < columns <= self.shape[1]):
            raise ValueError(
                f"the first {rows} x {columns} of a matrix of {self.shape[0]} x {self.shape[1]} do not exist"
            )
        apart = planes(dict(zip(META, self.meta, strict=True)))
        whole = -(-self.shape[0] // PANEL) if apart else int(kernels().rg_panel_bytes(ctypes.byref(self.struct)))
        stride = self.stride or whole
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
    cuts: Sequence[int] = (),
) -> Matrix:
    """Panels of codes.

    Args:
        codes_OI: uint8 below 2^bits.
        group: as `group_of` says.
        scale_ON: a step a group in the dtype in which it is kept (`STEPS`; uint8 is 2^(byte − 127)); None: only rows
            have steps. Of codes whose bits lie apart (`value.bias`) float16 of each level from 2 bits on.
        zero_ON: uint8 codes that decode to 0; None: `value` is symmetric.
        row_scale_O: float32.
        allocate: bytes → an empty uint8 tensor aligned to 64 bytes; `aligned` by default.
        cuts: groups at which rows are cut into runs, as `cuts_of` says.

    Raises:
        ValueError: panels cannot hold it, or the tensors are not of one matrix.
    """
    codes_OI = codes_OI.contiguous()
    checks.tensor("codes", codes_OI, (torch.uint8,), (None, None))
    checks.integers("bits", (bits,), 1, 9)
    checks.integers("inputs a group", (group,), 1)
    if codes_OI.numel() and int(codes_OI.max()) >> bits:
        raise ValueError(f"a code is {int(codes_OI.max())}, which {bits} bits do not hold")
    rows, columns = codes_OI.shape
    scale_ON = None if scale_ON is None else scale_ON.contiguous()
    meta = meta_of((rows, columns), bits, value, group, scale_ON, zero_ON is not None)
    table = torch.tensor(value.table, dtype=torch.float32, device="cpu") if value.table else None
    if table is not None and value.kind == TABLE and len(table) < 1 << bits:
        table = torch.cat([table, table.new_zeros((1 << bits) - len(table))])
    zero_ON = None if zero_ON is None else zero_ON.contiguous()
    groups = math.ceil(columns / group)
    levels = (bits - 1,) if value.kind == INT and value.bias else ()
    checks.optional("steps", scale_ON, tuple(STEPS), (*levels, rows, groups))
    checks.optional("zero points", zero_ON, (torch.uint8,), (rows, groups))
    if zero_ON is not None and zero_ON.numel() and int(zero_ON.max()) >> bits:
        raise ValueError(f"a zero point is {int(zero_ON.max())}, which {bits} bits do not hold")
    if row_scale_O is not None:
        checks.tensor("row scales", row_scale_O.contiguous(), tuple(DTYPES), (rows,))
        row_scale_O = torch.nn.functional.pad(row_scale_O.float(), (0, -rows % PANEL), value=1.0).contiguous()
    if not (need := panel_bytes(meta)):
        raise ValueError(f"panels cannot hold {bits} bits in groups of {group}")
    panels = (allocate or aligned)(need)
    matrix = Matrix(panels, row_scale_O, table, meta, stride_of(rows, columns, group, cuts))
    pointers = map(_pointer, (codes_OI, scale_ON, zero_ON, panels))
    _done(kernels().rg_pack(ctypes.byref(matrix.struct), *pointers, torch.get_num_threads()))
    return matrix


def linear(x_TI: Tensor, matrix: Matrix, activations: str = "int16") -> Tensor:
    """x Wᵀ (T, O) in the dtype of x, for any number of tokens; weights are read once for every four of them.

    Args:
        activations: a name of `ACTIVATIONS`. Grids of floats (fp8, fp6) always take float32.
    """
    checks.named("way to carry activations", activations, ACTIVATIONS)
    return linear_of(x_TI, matrix.struct, ACTIVATIONS[activations])


def linear_of(x_TI: Tensor, struct: Struct, activations: int) -> Tensor:
    """`linear` by a C view."""
    x_TI = checks.tokens(x_TI, struct.columns)
    y_TO = x_TI.new_empty(x_TI.shape[0], struct.rows)
    _done(
        kernels().rg_linear(
            ctypes.byref(struct),
            x_TI.data_ptr(),
            y_TO.data_ptr(),
            x_TI.shape[0],
            number(x_TI.dtype),
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
    x_TI = checks.tokens(x_TI, struct.columns)
    return _gemm(x_TI, None, None, struct, x_TI.dtype)


def blocked_integers(z_TI: Tensor, scale_T: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """(scale z) Wᵀ (T, O) of ready signed bytes with one float32 step a token; integer sums are exact."""
    return blocked_integers_of(z_TI, scale_T, matrix.struct, dtype)


def blocked_integers_of(z_TI: Tensor, scale_T: Tensor, struct: Struct, dtype: torch.dtype) -> Tensor:
    """`blocked_integers` by a C view."""
    checks.tensor("signed bytes of tokens", z_TI.contiguous(), (torch.int8,), (None, struct.columns))
    checks.tensor("steps of tokens", scale_T.contiguous(), tuple(DTYPES), (z_TI.shape[0],))
    return _gemm(None, z_TI.contiguous(), scale_T.float().contiguous(), struct, dtype)


def _gemm(
    x_TI: Tensor | None, z_TI: Tensor | None, scale_T: Tensor | None, struct: Struct, dtype: torch.dtype
) -> Tensor:
    given = x_TI if x_TI is not None else z_TI
    assert given is not None
    y_TO = torch.empty(given.shape[0], struct.rows, dtype=dtype, device="cpu")
    pointers = map(_pointer, (x_TI, z_TI, scale_T, y_TO))
    refused = kernels().rg_gemm(ctypes.byref(struct), *pointers, given.shape[0], number(dtype), torch.get_num_threads())
    _done(refused)
    return y_TO


def integers(z_TI: Tensor, matrix: Matrix) -> Tensor:
    """Exact Σ (code − offset) · z, int32 (T, O), of signed bytes z.

    Raises:
        ValueError: the sums could pass 32 bits, or codes are no integers.
    """
    z_TI = z_TI.contiguous()
    checks.tensor("signed bytes of tokens", z_TI, (torch.int8,), (None, matrix.shape[1]))
    y_TO = torch.empty(z_TI.shape[0], matrix.shape[0], dtype=torch.int32, device="cpu")
    refused = kernels().rg_integers(
        ctypes.byref(matrix.struct), z_TI.data_ptr(), y_TO.data_ptr(), z_TI.shape[0], torch.get_num_threads()
    )
    if refused and refused != NO_MEMORY:
        raise ValueError(f"sums over {matrix.shape[1]} products of {matrix.bits} bits do not fit 32 bits")
    _done(refused)
    return y_TO


def decode(matrix: Matrix, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Weights of rows [start, stop), computed in float32 and rounded once to `dtype`."""
    return decode_of(matrix.struct, start, stop, None, dtype)


def take(matrix: Matrix, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of rows by number (n,).

    Raises:
        IndexError: there is no such row.
    """
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"rows are asked for by integers, not {index.dtype}")
    return decode_of(matrix.struct, 0, index.numel(), index.reshape(-1).long().contiguous(), dtype)


def decode_of(struct: Struct, start: int, stop: int, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`decode`, or `take` where there is an index, by a C view."""
    if index is not None:
        checks.tensor("numbers of rows", index, (torch.int64,), (stop - start,))
    if start < 0 or (index is None and stop > struct.rows):
        raise IndexError(f"a row was asked for that is not in 0 … {struct.rows - 1}")
    out_OI = torch.empty(max(stop - start, 0), struct.columns, dtype=dtype, device="cpu")
    if not len(out_OI):
        return out_OI
    refused = kernels().rg_decode(
        ctypes.byref(struct), start, stop, _pointer(index), out_OI.data_ptr(), number(dtype), torch.get_num_threads()
    )
    if refused == NO_ROW:
        raise IndexError(f"a row was asked for that is not in 0 … {struct.rows - 1}")
    _done(refused)
    return out_OI


def unpack(matrix: Matrix) -> Tensor:
    """codes_OI, uint8, again."""
    codes_OI = torch.empty(matrix.shape, dtype=torch.uint8, device="cpu")
    _done(kernels().rg_unpack(ctypes.byref(matrix.struct), codes_OI.data_ptr(), torch.get_num_threads()))
    return codes_OI


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _done(refused: int) -> None:
    if refused == NO_MEMORY:
        raise MemoryError("the kernels could not have the memory that they work in")
    if refused:
        raise ValueError("the kernels do not have this product of such a matrix, or it is none")
