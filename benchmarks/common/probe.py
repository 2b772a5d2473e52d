"""The bandwidth of this very moment, and what this machine can do at most."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from common.records import Peaks
from regauge.kernels.cpu.library import library
from regauge.kernels.cpu.machine import bandwidth


def native() -> bool:
    """Whether the C++ probe reads; else torch's sum does, somewhat below what the memory gives."""
    return library() is not None


def gigabytes() -> float:
    """GB/s of sequential reads by all threads, at this moment."""
    return bandwidth() / 1e9


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
