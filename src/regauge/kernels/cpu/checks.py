"""What the kernels take on trust, checked before they are called: where a tensor lies, its dtype, its shape.

The C interface sees addresses and sizes. That there is as much memory behind an address as the sizes say, only the side
that has the tensors can know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from regauge.errors import nearest

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`rg_dtype` of each dtype that activations, caches and matrices in full precision may have."""
INT32 = 1 << 31


def tensor(what: str, given: Tensor, dtypes: Collection[torch.dtype], shape: tuple[int | None, ...]) -> None:
    """One that kernels may read: contiguous, in this CPU's memory, of one of these dtypes and of this shape.

    Args:
        shape: None: of any size along that axis.

    Raises:
        ValueError: it is not so; the sentence says what was given.
    """
    fits = given.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, given.shape, strict=True))
    if not fits or given.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} are {kinds} of shape ({wanted}), not {given.dtype} {tuple(given.shape)}")
    if given.layout != torch.strided or given.device.type != "cpu" or not given.is_contiguous():
        raise ValueError(f"{what} lie in one piece in this CPU's memory, not on {given.device} {given.stride()}")


def optional(what: str, given: Tensor | None, dtypes: Collection[torch.dtype], shape: tuple[int | None, ...]) -> None:
    """`tensor`, of one that may be absent."""
    if given is not None:
        tensor(what, given, dtypes, shape)


def number(dtype: torch.dtype) -> int:
    """The `rg_dtype` of a dtype.

    Raises:
        ValueError: kernels do not have it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"the kernels read and write float32, bfloat16 and float16, not {dtype}")
    return DTYPES[dtype]


def named(what: str, name: str, known: Collection[str]) -> None:
    """A name that is known.

    Raises:
        ValueError: it is not.
    """
    if name not in known:
        raise ValueError(f"{name!r} is no {what}{nearest(str(name), known)}")


def integers(what: str, given: Iterable[int], least: int = -INT32, below: int = INT32) -> None:
    """Integers of 32 bits, from `least` to below `below`: ctypes would cut longer ones without a word.

    Raises:
        ValueError: one is not.
    """
    for one in given:
        if not least <= one < below:
            raise ValueError(f"{what} are integers from {least} to {below - 1}, not {one}")


def tokens(x_TI: Tensor, columns: int) -> Tensor:
    """Activations (T, columns) of a dtype that kernels read, contiguous.

    Raises:
        ValueError: they are not such.
    """
    if x_TI.ndim != 2 or x_TI.shape[1] != columns or x_TI.dtype not in DTYPES or not x_TI.is_cpu:
        raise ValueError(f"(T, {columns}) floats are wanted, not {x_TI.dtype} {tuple(x_TI.shape)} on {x_TI.device}")
    return x_TI.contiguous()
