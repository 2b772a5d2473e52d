"""Work on some groups at a time.

Legend: G groups, K weights in a group.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK = 1 << 16
"""Elements worked on at a time, so that a few float32 temporaries stay in a core's second-level cache."""


def chunks(x_GK: Tensor) -> Iterator[slice]:
    """Slices of whole groups of about `CHUNK` elements."""
    groups, size = x_GK.shape
    step = max(1, CHUNK // max(size, 1))
    return (slice(start, start + step) for start in range(0, groups, step))
