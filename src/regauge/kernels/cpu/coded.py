"""Products of tokens that are codes already, with zero points: integer sums are exact, whoever rounded them.

Legend: O output channels, I input channels, T tokens, G groups of a token's channels that share a step.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.cpu import checks
from regauge.kernels.cpu.interface import Struct, has, kernels
from regauge.kernels.cpu.matrix import NO_MEMORY, Matrix


class Codes(ctypes.Structure):
    """`rg_codes`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "steps", "zeros")),
        *((name, ctypes.c_int32) for name in ("group", "shared")),
    ]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens as codes: value = step · (code − zero).

    Attributes:
        z_TI: int8.
        scale_TG: float32, a step for each of G equal groups of channels.
        zero_NG: int32 of a signed byte; N is T, or 1 where all tokens share them. None: 0.
    """

    z_TI: Tensor
    scale_TG: Tensor
    zero_NG: Tensor | None = None


def here() -> bool:
    """Whether the library multiplies ready codes."""
    return has("rg_coded")


def linear(x: Tokens, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """x Wᵀ (T, O) of any number of tokens.

    Raises:
        ValueError: a group of the matrix has more than one step of the tokens', a zero point is no signed byte, or the
            matrix is none of integers.
    """
    return linear_of(x, matrix.struct, dtype)


def linear_of(x: Tokens, struct: Struct, dtype: torch.dtype) -> Tensor:
    """`linear` by a C view."""
    z_TI, scale_TG, zero_NG = x.z_TI, x.scale_TG, x.zero_NG
    checks.tensor("signed bytes of tokens", z_TI, (torch.int8,), (None, struct.columns))
    checks.tensor("steps of tokens", scale_TG, (torch.float32,), (len(z_TI), None))
    count, groups = scale_TG.shape
    if not groups or struct.columns % groups:
        raise ValueError(f"{struct.columns} channels are no {groups} equal groups")
    shared = zero_NG is not None and len(zero_NG) == 1
    checks.optional("zero points of tokens", zero_NG, (torch.int32,), (1 if shared else count, groups))
    y_TO = torch.empty(count, struct.rows, dtype=dtype, device="cpu")
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (z_TI, scale_TG, zero_NG)]
    codes = Codes(*pointers, struct.columns // groups if groups > 1 else 0, int(shared))
    refused = kernels().rg_coded(
        ctypes.byref(struct), ctypes.byref(codes), y_TO.data_ptr(), count, checks.number(dtype), torch.get_num_threads()
    )
    if refused == NO_MEMORY:
        raise MemoryError("the kernels could not have the memory that they work in")
    if refused:
        raise ValueError("the kernels do not multiply such codes by such a matrix")
    return y_TO
