"""How a step is stored: lines of the table of parts."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import CACHE, INPUTS, WEIGHTS

NUMBERS = (WEIGHTS, INPUTS, CACHE)
"""Places whose elements are rounded."""
MODEL = (WEIGHTS, INPUTS)
"""Those of them that matrices are multiplied at; a cache is read by fewer formats."""
WORDS = ("iq2-xxs", "iq2-xs", "iq2-s", "iq3-xxs", "iq3-s")
"""Grids whose words are rows of a list."""
UNEVEN = dict.fromkeys(
    ("fp8", "fp8-e5m2", "fp6", "fp6-e2m3", "fp4", "nf4", "ternary", "trellis2", "trellis3", "trellis4", "iq4", *WORDS),
    "offsets are in steps, which only integers have",
)
"""Grids whose values do not lie evenly, and why what is learnt in steps refuses them."""
ZERO_ON_GRID = dict.fromkeys(
    (*UNEVEN, *(f"int{bits}" for bits in range(2, 9))), "that grid has its 0 among the codes: take an asymmetric one"
)
"""Grids beside whose steps no value of code 0 is kept, and why."""

SCALE_ROWS: Mapping[str, Part] = {
    "f32": Part("regauge.formats.scales:Float32", "the step in float32", places=MODEL),
    "f16": Part("regauge.formats.scales:Float16", "the step in float16", places=NUMBERS),
    "bf16": Part(
        "regauge.formats.scales:BFloat16", "the step in bfloat16", places=NUMBERS, offers={WEIGHTS: ("bf16",)}
    ),
    "e8m0": Part(
        "regauge.formats.scales:PowerOfTwo",
        "the step is a power of two in one byte (MX)",
        "2310.10537",
        fixed={"top": 0.0},
    ),
    "nv": Part(
        "regauge.formats.scales:TwoLevel",
        "the step in e4m3 under one float32 for the matrix (NVFP4)",
        fixed={"global_1": None},
    ),
    "f16-signed": Part(
        "regauge.formats.scales:Float16Signed", "the step in float16 with a sign, which turns the grid round"
    ),
    "f16-low": Part(
        "regauge.formats.nested:Float16Low",
        "the step and the value of code 0, each in float16",
        refuses={"grid": ZERO_ON_GRID},
    ),
    "f16-levels": Part(
        "regauge.formats.planes:Float16Levels",
        "the step and the value of code 0, each in float16, and a byte for each of the `count` coarsest levels",
        short="count",
        wants={"grid": ("nested",)},
    ),
    "super": Part(
        "regauge.formats.nested:Super",
        "the step in `bits` bits under a float16 for `groups` groups of a row (0: for all)",
        "https://github.com/ggml-org/llama.cpp/pull/1684",
        short="bits",
        fixed={"level_RL": None},
    ),
    "super-low": Part(
        "regauge.formats.nested:SuperWithLow",
        "the step and the value of code 0, in `bits` bits under a float16 for `groups` groups of a row",
        "https://github.com/ggml-org/llama.cpp/pull/1684",
        short="bits",
        refuses={"grid": ZERO_ON_GRID},
    ),
    "m1": Part("regauge.formats.scales:M1", "the step rounded up to a power of two", "2307.09782"),
    "m2": Part(
        "regauge.formats.scales:M2",
        "steps tied to the largest of their row by powers of two",
        "2307.09782",
        fixed={"row_R1": None},
    ),
}
