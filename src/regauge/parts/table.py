"""The one explicit table of parts: axis → name → constructor. Importing it imports no part and no torch.

To add a part: write it in its axis file, add its line here, and test that it beats its null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge.errors import RecipeError, nearest


@dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        path: `package.module:Name` of the constructor.
        what: what it does, in a line.
        cite: arXiv ids or a specification.
        fixed: options that the name itself fixes; a recipe cannot set them.
        short: the option that `name:value` sets.
        wants: axis → the parts of it that this one works through; any other beside it is a contradiction.
    """

    path: str
    what: str
    cite: str = ""
    fixed: Mapping[str, object] = field(default_factory=dict)
    short: str = ""
    wants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _ints() -> dict[str, Part]:
    grid = "regauge.formats.grids:Int"
    table = {}
    for bits in range(2, 9):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        table[f"int{bits}"] = Part(
            grid, f"integers {low} to {high}, no zero point", fixed={"bits": bits, "symmetric": True}
        )
        table[f"int{bits}-asym"] = Part(
            grid, f"integers 0 to {2**bits - 1} with a zero point", fixed={"bits": bits, "symmetric": False}
        )
    return table


AXES: Mapping[str, Mapping[str, Part]] = {
    "grid": {
        **_ints(),
        "fp8": Part("regauge.formats.grids:E4M3", "8-bit floats e4m3, up to 448", "2209.05433"),
        "fp8-e5m2": Part("regauge.formats.grids:E5M2", "8-bit floats e5m2, up to 57344", "2209.05433"),
        "fp6": Part("regauge.formats.grids:E3M2", "6-bit floats e3m2, up to 28", "2310.10537"),
        "fp6-e2m3": Part("regauge.formats.grids:E2M3", "6-bit floats e2m3, up to 7.5", "2310.10537"),
        "fp4": Part("regauge.formats.grids:E2M1", "4-bit floats e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6", "2310.10537"),
        "nf4": Part("regauge.formats.grids:NF4", "16 quantiles of the normal distribution", "2305.14314"),
        "ternary": Part("regauge.formats.grids:Ternary", "-1, 0 and 1 in two bits"),
    },
    "grain": {
        "channel": Part("regauge.formats.grains:Channel", "one step an output channel"),
        "tensor": Part("regauge.formats.grains:Whole", "one step for the whole matrix"),
        "group": Part(
            "regauge.formats.grains:Group", "one step for every `size` neighbours along the input", short="size"
        ),
    },
    "ranger": {
        "absmax": Part(
            "regauge.formats.rangers:AbsMax",
            "the range [-a, a] of a group, a its largest magnitude, over the whole grid",
        ),
        "minmax": Part("regauge.formats.rangers:MinMax", "least and greatest value land on the ends of the grid"),
        "search": Part(
            "regauge.formats.rangers:Search", "the shrink of the range with the least (weighted) squared error"
        ),
    },
    "scale": {
        "f32": Part("regauge.formats.scales:Float32", "the step in float32"),
        "f16": Part("regauge.formats.scales:Float16", "the step in float16"),
        "bf16": Part("regauge.formats.scales:BFloat16", "the step in bfloat16"),
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
        "m1": Part("regauge.formats.scales:M1", "the step rounded up to a power of two", "2307.09782"),
        "m2": Part(
            "regauge.formats.scales:M2",
            "steps tied to the largest of their row by powers of two",
            "2307.09782",
            fixed={"row_R1": None},
        ),
    },
    "rounder": {
        "nearest": Part("regauge.rounding.rounders:Nearest", "each weight takes the nearest code; needs no text"),
        "importance": Part(
            "regauge.rounding.rounders:ImportanceNearest",
            "nearest, with the step fitted where the inputs are large (E[x²])",
            wants={"ranger": ("search",)},
        ),
        "gptq": Part(
            "regauge.rounding.rounders:GPTQ",
            "column by column, the error of each pushed on to those not yet rounded",
            "2210.17323",
        ),
    },
    "compensator": {
        "lorc": Part(
            "regauge.rounding.compensators:LoRC",
            "the error's best approximation of low rank, added back",
            "2307.09782",
            short="rank",
        ),
    },
    "rewrite": {
        "fold-norm": Part(
            "regauge.rewrites.norms:FoldNorm", "gain and bias of each norm go into its readers", "2404.00456"
        ),
        "layernorm-to-rms": Part(
            "regauge.rewrites.norms:LayerNormToRMS",
            "centred writers of the residual make LayerNorm an RMSNorm",
            "2305.14858",
        ),
        "smooth-norms": Part(
            "regauge.rewrites.smoothing:SmoothNorms",
            "scales behind each norm move outliers from inputs to weights",
            "2211.10438",
            short="alpha",
        ),
        "smooth-streams": Part(
            "regauge.rewrites.smoothing:SmoothStreams",
            "every scalable stream smoothed, one strength for the model by its own loss",
            "2312.03788",
        ),
        "rotate": Part(
            "regauge.rewrites.rotation:RotateHadamard", "residual and values turned by a Hadamard matrix", "2404.00456"
        ),
        "permute": Part(
            "regauge.rewrites.permutation:PermuteByImportance", "channels sorted so that the prefix matters most"
        ),
    },
}


def part(axis: str, name: str) -> Part:
    """The line of the table, or the named part of another package."""
    if axis not in AXES:
        raise RecipeError(f"there is no axis {axis!r}{nearest(axis, AXES)}")
    if foreign(name):
        return Part(name, f"a part of another package: {name}")
    if name not in AXES[axis]:
        raise RecipeError(f"there is no {axis} {name!r}{nearest(name, AXES[axis])}")
    return AXES[axis][name]


def foreign(name: str) -> bool:
    """Whether the name is `package.module:Name` of another package."""
    return "." in name.partition(":")[0] and ":" in name
