"""XᵀX of activations in bfloat16, by the CPU's tile unit where it has one.

Floor: I² (T + 1) multiply-adds of bfloat16, for the sum is symmetric and only half of it is computed; what is written
once a call is the half of I² sums in float32. Legend: T tokens, I input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.kernels.cpu.interface import kernels
from regauge.kernels.cpu.library import library


def has_gram() -> bool:
    """Whether this CPU sums XᵀX of bfloat16 faster than a product in float32 does."""
    return library() is not None and bool(kernels().rg_has_gram())


def gram(x_TI: Tensor, sum_II: Tensor) -> None:
    """Adds XᵀX of bfloat16 rows to the upper triangle of `sum_II`; below it nothing that is there can be relied on.

    Products are exact, sums are float32: of 1,024 rows each, then of these. `sum_II` must be float32 and contiguous.

    Raises:
        ValueError: another dtype, shape or layout.
        MemoryError: no room for the packed rows (4 · T · I bytes, of 1,024 rows at most).
    """
    channels = x_TI.shape[1]
    if x_TI.dtype is not torch.bfloat16 or sum_II.dtype is not torch.float32 or not sum_II.is_contiguous():
        raise ValueError(
            f"rows of bfloat16 and contiguous sums of float32 are needed, not {x_TI.dtype}, {sum_II.dtype}"
        )
    if tuple(sum_II.shape) != (channels, channels) or x_TI.dim() != 2:
        raise ValueError(f"the sums of rows of {channels} are ({channels}, {channels}), not {tuple(sum_II.shape)}")
    x_TI = x_TI.contiguous()
    answer = kernels().rg_gram(x_TI.data_ptr(), len(x_TI), channels, sum_II.data_ptr(), torch.get_num_threads())
    if answer == 1:
        raise MemoryError(f"no memory to pack 1,024 rows of {channels} activations")
    if answer:
        raise ValueError("this CPU has no tile unit: ask has_gram() first")


def mirrored(sum_II: Tensor) -> Tensor:
    """The whole of a symmetric matrix of which the upper triangle is there, in place, by blocks."""
    size = len(sum_II)
    for start in range(0, size, 1024):
        end = min(start + 1024, size)
        corner = sum_II[start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).T)
        sum_II[end:, start:end] = sum_II[start:end, end:].T
    return sum_II
