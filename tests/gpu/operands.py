"""Random operands for the kernels, each beside poison: a read past an edge shows in the result, or crashes."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch
from torch import Tensor

from regauge.kernels import reference

PAD = 64
"""Elements of poison before, and on a GPU after."""


def guarded(values: Tensor, device: torch.device) -> Tensor:
    """The same values after NaN, or the greatest integer. On a CPU memory ends with them: a read past them crashes."""
    poison = math.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    after = 0 if device.type == "cpu" else PAD
    count = PAD + values.numel() + after
    buffer = before_a_wall(count, values.dtype) if device.type == "cpu" else torch.empty(count, dtype=values.dtype)
    buffer.fill_(poison)[PAD : count - after] = values.reshape(-1)
    return buffer.to(device)[PAD : count - after].view(values.shape)


def before_a_wall(count: int, dtype: torch.dtype) -> Tensor:
    """A CPU tensor whose last byte is the last that may be read."""
    size = count * dtype.itemsize
    held = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, held + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    forbid = ctypes.CDLL(None, use_errno=True).mprotect
    forbid.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if forbid(address + held, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=held - size)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 in low … high − 1, both ends included at least once."""
    drawn = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    if drawn.numel() > 1:
        drawn.view(-1)[0], drawn.view(-1)[-1] = low, high - 1
    return drawn


def packed(bits: int, rows: int, columns: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Packed rows on the device, and their codes (uint8)."""
    codes_OI = integers(0, 1 << bits, rows, columns, seed=seed).to(torch.uint8)
    return guarded(reference.pack(codes_OI, bits), device), codes_OI


def far(found: Tensor, wanted: Tensor) -> float:
    """Distance relative to what is wanted, in float64; infinite where a NaN was found."""
    gap = ((found.cpu().double() - wanted.double()).norm() / wanted.double().norm()).item()
    return math.inf if math.isnan(gap) else gap
