"""What this machine's memory gives, and what this process holds of it: the one probe, and the one count."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from regauge.kernels.cpu.interface import kernels
from regauge.kernels.cpu.library import library

SIZE = 512 << 20
"""Bytes that the probe reads: more than any cache holds."""


def bandwidth(threads: int | None = None, seconds: float = 0.1, size: int = SIZE, folder: Path | None = None) -> float:
    """Bytes a second of sequential reads from `size` bytes: the best pass of those that fit in `seconds` (one at
    least).

    Without the C++ kernels torch's sum over a buffer is timed, which is somewhat below what the memory gives.

    Args:
        threads: that read; None: torch's.
        folder: where a file of holes is mapped instead of a buffer of the process's own: its pages are the system's,
            and no more of them are anonymous. Read by torch's sum.
    """
    if folder is not None:
        return _of_file(folder, seconds, size)
    if library() is not None:
        return float(kernels().rg_bandwidth(threads or torch.get_num_threads(), size, seconds))
    return _summed(torch.ones(size // 4, dtype=torch.float32, device="cpu"), seconds)


def _summed(buffer: torch.Tensor, seconds: float) -> float:
    best, until = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < until:
        start = time.perf_counter()
        buffer.sum()
        best = max(best, 4 * buffer.numel() / (time.perf_counter() - start))
    return best


def _of_file(folder: Path, seconds: float, size: int) -> float:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
            buffer = torch.frombuffer(mapped, dtype=torch.float32)
            buffer.sum()  # every page is there from now on
            best = _summed(buffer, seconds)
            del buffer
    return best


def cpus(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: of its affinity, and of the quota of its control group, rounded up; at least 1.

    Args:
        groups: where the control groups are told (Linux).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    for name, period in (("cpu.max", ""), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            told = (groups / name).read_text(encoding="utf-8").split()
            told += (groups / period).read_text(encoding="utf-8").split() if period else []
            if int(told[0]) > 0:
                found = min(found, math.ceil(int(told[0]) / int(told[1])))
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue  # no quota, or no control groups
    return max(1, found)


def load() -> float | None:
    """Processes that wanted a CPU over the last minute, as the system tells it; None where it tells nothing."""
    average = getattr(os, "getloadavg", None)
    try:
        return None if average is None else float(average()[0])
    except OSError:
        return None


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


def give_back() -> None:
    """What is reachable no more, cycles among it (a model's modules know each other), and then what is free, to the
    system. Some tenths of a second beside a large model: for the end of a step."""
    gc.collect()
    trim()
