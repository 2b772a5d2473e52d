"""What the peers of `cache.py` share: caches are filled with random keys and values in bf16, not by reading a text.

Of random weights the time of a token does not depend on what a cache holds, only on how much. Bytes are told twice: as
the cache's own tensors count them, and as the process grew while the cache was filled.
"""

from __future__ import annotations

import ctypes
import gc
import os
import time
from collections.abc import Callable, Iterator

import torch

PIECE = 1024
"""Tokens that are put in at once, where a cache takes them in pieces."""
LONG = 0.7
"""Seconds after which a sample ends, however few tokens it has."""


def resident() -> int:
    """Bytes of this process in memory, once what was freed has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pieces(tokens: int, heads: int, size: int, at_once: int = PIECE) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) (1, heads, T, size) in bf16, of so many tokens together."""
    made = torch.randn(2, 1, heads, min(at_once, tokens), size, dtype=torch.float32, device="cpu").bfloat16()
    for start in range(0, tokens, at_once):
        keys, values = made[:, :, :, : min(at_once, tokens - start)]
        yield keys, values


def a_token(step: Callable[[], None], most: int) -> list[float]:
    """Seconds a token over so many of them, or as many as fit."""
    start, count = time.perf_counter(), 0
    while count < most and (not count or time.perf_counter() - start < LONG):
        step()
        count += 1
    return [(time.perf_counter() - start) / count]
