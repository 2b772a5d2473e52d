"""Random packed parts of a cache, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regauge.kernels.attention import Part
from regauge.kernels.blocks import BlockLayout


def drawn(layout: BlockLayout, count: int, generator: torch.Generator) -> Tensor:
    """So many random blocks whose numbers are about as large as those of a standard normal variable."""
    shape = count, layout.tokens, layout.channels
    if layout.bits == 16:
        return layout.rows(torch.randn(shape, generator=generator))
    if layout.grid == "e4m3":
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
        return layout.pack(codes, torch.rand(count, layout.groups, generator=generator) + 0.5)
    codes = torch.randint(0, 1 << layout.bits, shape, generator=generator, dtype=torch.uint8)
    steps = (torch.rand(count, layout.groups, generator=generator) + 0.3) * (3.0 / (1 << layout.bits))
    lows = torch.randn(count, layout.groups, generator=generator) - 1.5 if layout.low else None
    return layout.pack(codes, steps, lows)


def part_of(keys: BlockLayout, values: BlockLayout, lengths: Tensor, generator: torch.Generator) -> Part:
    """A part with heads of so many tokens, (B, K); heads lie in the reverse order, with gaps between them."""
    tokens = keys.tokens
    flat = lengths.flatten().long() // tokens
    starts = (flat.flip(0).cumsum(0) - flat.flip(0)).flip(0).view_as(lengths)
    order = torch.arange(flat.numel() - 1, -1, -1, dtype=torch.int64).view_as(lengths)
    memory, offsets = [], []
    for layout in (keys, values):
        gap = 64
        whole = torch.full((int(flat.sum()) * layout.bytes + gap * flat.numel(),), 255, dtype=torch.uint8)
        own = starts * layout.bytes + gap * order
        for place, blocks in zip(own.flatten().tolist(), flat.tolist(), strict=True):
            found = drawn(layout, blocks, generator).flatten()
            whole[place : place + found.numel()] = found
        memory.append(whole)
        offsets.append(own)
    return Part(keys, values, *memory, *offsets, lengths.int())


def with_rows(part: Part, generator: torch.Generator) -> Part:
    """With multipliers of tokens."""
    lengths = part.lengths_BK.flatten().long()
    count = max(int(lengths.sum()), 1)
    rows = [torch.rand(count, generator=generator) + 0.5 for _ in range(2)]
    offsets = (lengths.cumsum(0) - lengths).view_as(part.lengths_BK)
    return replace(part, key_rows=rows[0], value_rows=rows[1], row_offsets_BK=offsets)
