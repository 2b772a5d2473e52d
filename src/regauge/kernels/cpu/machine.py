"""What this machine's memory gives, and what this process holds of it: the one probe, and the one count."""

from __future__ import annotations

import ctypes
import sys
import time

import psutil
import torch

from regauge.kernels.cpu.interface import kernels
from regauge.kernels.cpu.library import library

SIZE = 512 << 20
"""Bytes that the probe reads: more than any cache holds."""


def bandwidth(threads: int | None = None, seconds: float = 0.1, size: int = SIZE) -> float:
    """Bytes a second of sequential reads from `size` bytes: the best pass of those that fit in `seconds` (one at
    least).

    Without the C++ kernels torch's sum over a buffer is timed, which is somewhat below what the memory gives.

    Args:
        threads: that read; None: torch's.
    """
    if library() is not None:
        return float(kernels().rg_bandwidth(threads or torch.get_num_threads(), size, seconds))
    buffer = torch.ones(size // 4, dtype=torch.float32, device="cpu")
    best, until = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        start = time.perf_counter()
        buffer.sum()
        best = max(best, 4 * buffer.numel() / (time.perf_counter() - start))
    return best


def anonymous_bytes() -> int:
    """Anonymous resident bytes of this process: pages of mapped files, which can be dropped at any time, do not count.

    On Linux what psutil calls `shared` is file and shared pages, so `rss - shared` is the kernel's `RssAnon`. Elsewhere
    psutil's `uss` (pages that only this process has) comes nearest.
    """
    process = psutil.Process()
    found = process.memory_info()
    return int(found.rss - found.shared if hasattr(found, "shared") else process.memory_full_info().uss)


def trim() -> None:
    """Gives freed memory back to the system, where the C library can (glibc)."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
