"""How linear layers are timed, for every peer: passes over unique matrices of one shape, so that memory is read."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST = 0.1  # seconds of a sample


def copies(rows: int, columns: int, bits: float, least: int) -> int:
    """Matrices in turn: as many as hold `least` bytes."""
    return max(2, -(-least * 8 // int(rows * columns * bits)))


def passing(once: Callable[[], object], seconds: float = LEAST) -> Callable[[], list[float]]:
    """Runs whole passes for `seconds` at least, one of them unmeasured, and gives the mean of a pass."""

    def run() -> list[float]:
        once()
        count, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds or not count:
            once()
            count += 1
        return [spent / count]

    return run


def facts(options: dict[str, int], size: int, count: int, kind: str) -> dict[str, object]:
    """What is told of `count` matrices of `size` bytes together."""
    weights = count * options["rows"] * options["columns"]
    operations = 2.0 * weights * options["batch"]
    return {"bytes": size, "bits": 8 * size / weights, "count": count, "operations": operations, "kind": kind}
