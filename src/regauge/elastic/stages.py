"""Blocks of a model whose states change their size between stages: which stay, and which a count of them means."""

from __future__ import annotations

from collections.abc import Sequence

from regauge.anatomy.model import Anatomy


def staged(count: int, anatomy: Anatomy) -> tuple[int, ...]:
    """The first blocks of each stage, stage by stage in turn; a stage begins with a block that stays."""
    begins = sorted({0, *anatomy.plumbing.stays})
    ends = [*begins[1:], anatomy.blocks]
    turns = [(block - begin, block) for begin, end in zip(begins, ends, strict=True) for block in range(begin, end)]
    return tuple(sorted(block for _, block in sorted(turns)[:count]))


def lacking(blocks: Sequence[int], anatomy: Anatomy) -> str:
    """That a block is left out which must not be, as a clause; "" where none is."""
    lost = next((block for block in anatomy.plumbing.stays if block not in blocks), None)
    return "" if lost is None else f"block {lost} changes the size of what flows through it, so it stays"
