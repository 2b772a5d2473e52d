"""The bandwidth of this very moment, and what this machine can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from common.records import Peaks

SIZE = 512 << 20  # bytes read by the fallback: more than any cache holds


def native() -> Callable[[], float] | None:
    """The C++ probe, GB/s of sequential reads by all threads; None where the kernels are not built."""
    from regauge.kernels.cpu import library

    if library.library() is None:
        return None
    from regauge.kernels.cpu.machine import bandwidth

    return lambda: float(bandwidth(torch.get_num_threads()))


class Fallback:
    """torch's sum over a buffer: somewhat below what the memory gives, so fractions of it are too high."""

    def __init__(self, size: int = SIZE) -> None:
        self.buffer = torch.ones(size // 4)

    def __call__(self) -> float:
        best = 0.0
        until = time.perf_counter() + 0.1
        while not best or time.perf_counter() < until:
            start = time.perf_counter()
            self.buffer.sum()
            best = max(best, 4 * self.buffer.numel() / (time.perf_counter() - start) / 1e9)
        return best


def best(work: Callable[[], object], seconds: float = 0.3) -> float:
    """Least seconds of the repeats that fit."""
    least, until = float("inf"), time.perf_counter() + seconds
    while least == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return least


def peaks(size: int = 2048) -> Peaks:
    """Operations a second of the library's square products in bf16 and int8: the height of the waterline."""
    wide = torch.randn(size, size).bfloat16()
    narrow = torch.randint(-128, 128, (size, size), dtype=torch.int8)
    operations = 2.0 * size**3
    return Peaks(
        bf16=operations / best(lambda: torch.mm(wide, wide)),
        int8=operations / best(lambda: torch._int_mm(narrow, narrow)),
    )


class Others:
    """Cores that processes other than the given ones kept busy since the last reading."""

    def __init__(self, ours: Callable[[], list[psutil.Process]]) -> None:
        self.ours = ours
        self.last = self._now()

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        mine = [process.cpu_times() for process in self.ours()]
        idle = times.idle + getattr(times, "iowait", 0.0)
        return time.monotonic(), sum(times) - idle, sum(spent.user + spent.system for spent in mine)

    def __call__(self) -> float:
        before, self.last = self.last, self._now()
        wall, busy, mine = (now - then for now, then in zip(self.last, before, strict=True))
        return max(0.0, (busy - mine) / wall) if wall > 0 else 0.0
