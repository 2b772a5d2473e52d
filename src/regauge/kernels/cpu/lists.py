"""Rounding to code words: the nearest row of a list of magnitudes, each weight with a sign, by the C++ kernels.

What the words are, and the same in torch: `formats/codewords.py`. Floor: a load, a sum and a comparison for each row of
the list and sixteen pieces of eight or four weights, so 1.5 to 6 ns a weight (`native/lists.h`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.kernels.cpu.interface import has, kernels

WORD = 8


@dataclass(frozen=True, eq=False)
class Words:
    """A list.

    Attributes:
        rows_L: int16, the places of a row's magnitudes among the sizes, the first weight's lowest.
        sizes: float32, rising.
        piece: weights of a row, 8 or 4.
        even: whether the negative ones of eight weights are even in number.
    """

    rows_L: Tensor
    sizes: Tensor
    piece: int
    even: bool


class _List(ctypes.Structure):
    """`rg_list`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "sizes")),
        *((name, ctypes.c_int32) for name in ("count", "kinds", "piece", "even")),
    ]


def near(z_WR: Tensor, weight_WR: Tensor | None, words: Words) -> Tensor | None:
    """The values of the words nearest to z, float32 (W, 8); None: no kernels here, so that torch computes.

    Args:
        z_WR: float32; what is no number counts as 0.
        weight_WR: float32, what each square counts; its first stride may be 0: the same for all words.
    """
    if z_WR.device.type != "cpu" or not has("rg_lists_near"):
        return None
    z_WR = z_WR.detach().contiguous()
    pitch = WORD
    if weight_WR is not None:
        alike = weight_WR.stride(0) == 0
        weight_WR = (weight_WR[:1] if alike else weight_WR).detach().contiguous()
        pitch = 0 if alike else WORD
    found_WR = torch.empty_like(z_WR)
    view = _List(
        words.rows_L.data_ptr(),
        words.sizes.data_ptr(),
        words.rows_L.numel(),
        words.sizes.numel(),
        words.piece,
        int(words.even),
    )
    answer = kernels().rg_lists_near(
        ctypes.byref(view),
        z_WR.data_ptr(),
        0 if weight_WR is None else weight_WR.data_ptr(),
        pitch,
        len(z_WR),
        found_WR.data_ptr(),
        torch.get_num_threads(),
    )
    if answer == 1:
        raise MemoryError("no memory to search the rows of a list of code words")
    if answer != 0:
        raise ValueError("the kernels have no such list of code words")
    return found_WR
