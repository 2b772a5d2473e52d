"""x Wᵀ for so few tokens that tensor cores would multiply padding: `reference.linear` by sums of products.

A program takes a few rows of W and walks along them; a thread holds whole words of eight codes. Σ step (value − zero) x
over a word is step (Σ value x − zero Σ x), so steps and zero points are read once a word, and Σ x once a word for all
rows. Sums are float32, in an order that depends on nothing but the shape.

Legend: M tokens, a power of two; N rows of W; G eights in a tile along a row.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from regauge.kernels.triton.tiles import eights, lane, value

MOST = 2
"""Tokens up to which this is used: at four, products of tiles are as fast (H100)."""
ROWS, EIGHTS, WARPS = 8, 128, 4
"""Of a program."""


@triton.jit
@no_type_check
def vectors(
    x, packed, table, scale, zero, bias, y, inputs, width, group, groups, tokens, outputs,
    LOW: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, ONE_STEP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Operands as those of `_linear`; `y` and `bias` are finished here."""
    m, n = tl.arange(0, M), tl.program_id(0) * N + tl.arange(0, N)
    rows = packed + n.to(tl.int64)[:, None] * width
    steps = (n * 0 if ONE_STEP else n * groups)[:, None]
    x_rows = x + m.to(tl.int64)[:, None, None] * inputs
    acc = tl.zeros([M, N, G], tl.float32)
    for tile in range(tl.cdiv(inputs, 8 * G)):
        g = tile * G + tl.arange(0, G)
        inside = (n < outputs)[:, None] & (8 * g < inputs)[None, :]
        word = eights(rows, g[None, :], inside, width, BITS, UNIT)
        sums = tl.zeros([M, N, G], tl.float32)
        plain = tl.zeros([M, 1, G], tl.float32)
        for l in tl.static_range(8):
            k = (8 * g + l)[None, None, :]
            x_M1G = tl.load(x_rows + k, mask=(m < tokens)[:, None, None] & (k < inputs), other=0.0).to(tl.float32)
            sums += x_M1G * value(lane(word, l, BITS), table, LOW)[None, :, :]
            plain += x_M1G
        at = steps + (8 * g // group)[None, :]
        if zero is not None:
            sums -= plain * tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)[None, :, :]
        acc += sums * tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    out = tl.sum(acc, 2)
    if bias is not None:
        out += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=(m < tokens)[:, None] & (n < outputs)[None, :])
