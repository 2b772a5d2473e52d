"""By what the streams of a family are sorted, so that the first units are the best part to keep.

An order is the name of the rewrite that sorts: exact moves, certified like any other. `none` leaves channels as they
lie, which is the null that every order must beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ORDERS: Mapping[str, str] = {"activation": "permute", "none": ""}
"""Order → the rewrite that sorts by it; "": nothing is sorted."""
SORTED = {"ffn": "ffn", "heads": "heads", "width": "residual"}
"""Dimension → the kind of stream that is sorted for it."""


def ranked(influences: Sequence[float]) -> tuple[int, ...]:
    """Every block, the most important first; of equals the earlier."""
    return tuple(sorted(range(len(influences)), key=lambda block: (-influences[block], block)))
