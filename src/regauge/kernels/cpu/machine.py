"""What this machine's memory gives: the probe that stands beside every figure."""

from __future__ import annotations

from regauge.kernels.cpu.interface import kernels


def bandwidth(threads: int, seconds: float = 0.1, size: int = 512 << 20) -> float:
    """GB/s of sequential reads by `threads` threads from `size` bytes (by default more than a cache holds): the best
    pass of those that fit in `seconds` (one at least)."""
    return float(kernels().rg_bandwidth(threads, size, seconds)) / 1e9
