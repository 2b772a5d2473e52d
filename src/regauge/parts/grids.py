"""The numbers that a code may stand for, by name: integers, small floats, lists and books of codes."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.codebooks import CODE_BOOK_ROWS
from regauge.parts.part import Part
from regauge.parts.points import CACHE, INPUTS, WEIGHTS
from regauge.parts.scales import MODEL, NUMBERS

COARSE, FINE = "group:128 else group:64 else channel", "group:32"
"""The grains that the search tries: the coarsest that pays, and a fine one."""
OFFERED = {**{f"int{bits}-asym": (COARSE, FINE) for bits in (2, 3, 4, 5, 6)}, "int8": ("channel",)}
"""Integers that the search tries, with their grains: asymmetric below 8 bits, where one more code counts."""


def _ints() -> dict[str, Part]:
    grid = "regauge.formats.grids:Int"
    table = {}
    for bits in range(2, 9):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        for name, what, symmetric in (
            (f"int{bits}", f"integers {low} to {high}, no zero point", True),
            (f"int{bits}-asym", f"integers 0 to {2**bits - 1} with a zero point", False),
        ):
            offers = {WEIGHTS: OFFERED[name]} if name in OFFERED else {}
            fixed = {"bits": bits, "symmetric": symmetric}
            table[name] = Part(grid, what, fixed=fixed, places=NUMBERS, offers=offers)
    one = {"bits": 1, "symmetric": False}
    table["int1-asym"] = Part(grid, "0 and 1 with a zero point", fixed=one, places=(CACHE,))
    return table


GRID_ROWS: Mapping[str, Part] = {
    **_ints(),
    "nested": Part(
        "regauge.formats.prefixes:Nested",
        "integers whose codes' first bits are codes of fewer bits, so that a matrix can be read at 2 bits or more",
        "2402.10517",
        short="bits",
    ),
    "fp8": Part("regauge.formats.grids:E4M3", "8-bit floats e4m3, up to 448", "2209.05433", places=NUMBERS),
    "fp8-e5m2": Part("regauge.formats.grids:E5M2", "8-bit floats e5m2, up to 57344", "2209.05433", places=MODEL),
    "fp6": Part("regauge.formats.grids:E3M2", "6-bit floats e3m2, up to 28", "2310.10537", places=MODEL),
    "fp6-e2m3": Part("regauge.formats.grids:E2M3", "6-bit floats e2m3, up to 7.5", "2310.10537", places=MODEL),
    "fp4": Part(
        "regauge.formats.grids:E2M1", "4-bit floats e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6", "2310.10537", places=MODEL
    ),
    "nf4": Part("regauge.formats.grids:NF4", "16 quantiles of the normal distribution", "2305.14314", places=MODEL),
    "ternary": Part("regauge.formats.grids:Ternary", "-1, 0 and 1 in two bits", places=MODEL),
    **CODE_BOOK_ROWS,
    "log2": Part("regauge.formats.logs:Log2", "1, 1/2, 1/4, … and 0", "2111.13824", short="bits", places=(INPUTS,)),
    "log-sqrt2": Part(
        "regauge.formats.logs:LogSqrt2", "1, 1/√2, 1/2, … and 0", "2402.05628", short="bits", places=(INPUTS,)
    ),
}
