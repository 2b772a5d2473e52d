"""What several kernels share: reading packed rows by eights, decoding e4m3, finishing a tile.

**Eights.** Eight codes of b bits are exactly b bytes, so a tile reads words of eight codes and takes one code (one
*lane*) of every word at a time: lane l of word g is input channel 8g + l. A product may sum its channels in any order,
so each lane is a matrix product of its own and nothing is interleaved in registers.

Every device function is `no_type_check`: its source is compiled by triton, not run by Python.

Legend: M, N edges of a tile of outputs (tokens, output channels); G eights in a tile along a row.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def edges(M: tl.constexpr, N: tl.constexpr):
    """Which rows and columns of the result this program makes."""
    return tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)


@triton.jit
@no_type_check
def eights(rows, g, mask, width, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Words of eight codes, 32 bits wide up to 4 bits a code and 64 above.

    Args:
        rows: pointers to the first unit of each row; a unit has UNIT bytes, and UNIT divides BITS.
        g: which eight; broadcasts against `rows`.
        mask: which rows exist.
        width: units in a row. An eight that the end of the row cuts is filled up with zeros.
    """
    word = tl.zeros(mask.shape, tl.uint32 if BITS <= 4 else tl.uint64)
    for j in tl.static_range(BITS // UNIT):
        unit = g * (BITS // UNIT) + j
        part = tl.load(rows + unit, mask=mask & (unit < width), other=0)
        word = word | (part.to(word.dtype) << (8 * UNIT * j))
    return word


@triton.jit
@no_type_check
def lane(word, L: tl.constexpr, BITS: tl.constexpr):
    """Code L of each word, int32."""
    return ((word >> (BITS * L)) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
@no_type_check
def e4m3(code):
    """float16 of e4m3 bytes, exactly, on any GPU: the exponent's bias grows from 7 to 15, so the value by 2^8."""
    wide = code.to(tl.uint16)
    magnitude = ((wide & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
    value = tl.where((wide & 0x80) != 0, -magnitude, magnitude)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)


@triton.jit
@no_type_check
def value(code, table, LOW: tl.constexpr):
    """What a code stands for before its step, float32."""
    return code.to(tl.float32) + LOW if table is None else tl.load(table + code).to(tl.float32)


@triton.jit
@no_type_check
def finish(acc, y, x_scale, w_scale, bias, m, n, tokens, outputs, PER_ROW: tl.constexpr):
    """Scales a tile of sums, adds the bias and writes it; a scale or bias that is None is left out.

    Args:
        x_scale: one float a token. w_scale: one a row if PER_ROW, else one for the matrix.
    """
    out = acc
    if w_scale is not None:
        if PER_ROW:
            out = out.to(tl.float32) * tl.load(w_scale + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
        else:
            out = out.to(tl.float32) * tl.load(w_scale).to(tl.float32)
    if x_scale is not None:
        out = out.to(tl.float32) * tl.load(x_scale + m, mask=m < tokens, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        out = out + tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    inside = (m < tokens)[:, None] & (n < outputs)[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def combine(
    parts,
    y,
    x_scale,
    w_scale,
    bias,
    tokens,
    outputs,
    size,
    PER_ROW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Adds the sums of SPLIT parts of each row, always in the same order, and finishes them.

    Args:
        parts: (SPLIT, tokens, outputs), `size` elements a part.
    """
    m, n = edges(M, N)
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    inside = (m < tokens)[:, None] & (n < outputs)[None, :]
    acc = tl.zeros([M, N], parts.dtype.element_ty)
    at = place
    for _ in tl.static_range(SPLIT):
        acc += tl.load(parts + at, mask=inside, other=0)
        at += size
    finish(acc, y, x_scale, w_scale, bias, m, n, tokens, outputs, PER_ROW)
