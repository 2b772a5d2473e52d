"""The one explicit table of parts: table → name → constructor. Importing it imports no part and no torch.

To add a part: write it in its axis file, add its line here (or in `grids.py`, `shape.py`, `moves.py` or
`transforms.py`), and test that it beats its null. An axis that is not in here, or is empty, has no parts yet: a recipe
may speak of it, and is refused before any work.
"""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.attention import ATTENTION_ROWS
from regauge.parts.caches import CACHE_ROWS
from regauge.parts.grids import GRID_ROWS
from regauge.parts.moves import REWRITE_ROWS
from regauge.parts.part import Part
from regauge.parts.points import ARITHMETIC, CACHE, INPUTS, MEASURE, WEIGHTS
from regauge.parts.scales import MODEL, NUMBERS, SCALE_ROWS, UNEVEN
from regauge.parts.shape import SHAPE_ROWS
from regauge.parts.tokens import TOKEN_ROWS
from regauge.parts.transforms import TRANSFORM_ROWS

TABLE: Mapping[str, Mapping[str, Part]] = {
    "grid": GRID_ROWS,
    "grain": {
        "channel": Part("regauge.formats.grains:Channel", "one step an output channel"),
        "tensor": Part("regauge.formats.grains:Whole", "one step for the whole matrix", places=MODEL),
        "group": Part(
            "regauge.formats.grains:Group",
            "one step for every `size` neighbours along the input",
            short="size",
            places=NUMBERS,
            beside={"scale": "super:8"},
        ),
        "token": Part("regauge.formats.grains:Token", "one step a token", places=(INPUTS, CACHE)),
        "time": Part(
            "regauge.formats.grains:Time",
            "one step a channel for every `size` tokens in a row",
            "2402.02750",
            short="size",
            places=(CACHE,),
        ),
    },
    "ranger": {
        "absmax": Part(
            "regauge.formats.rangers:AbsMax",
            "the range [-a, a] of a group, a its largest magnitude, over the whole grid",
            places=(WEIGHTS, CACHE),
        ),
        "minmax": Part(
            "regauge.formats.rangers:MinMax",
            "least and greatest value land on the ends of the grid",
            places=(WEIGHTS, CACHE),
        ),
        "search": Part(
            "regauge.formats.rangers:Search",
            "the shrink of the range with the least (weighted) squared error",
            offers={WEIGHTS: ("search",)},
            cost="seven passes over the weights for each of some twenty shrinks",
        ),
        "least-squares": Part(
            "regauge.formats.refits:LeastSquares",
            "of some trial steps, each refitted by least squares to its codes, that of the least (weighted) error",
            "https://github.com/ggml-org/llama.cpp/pull/1684",
            cost="ten passes over the weights for each of twenty trials; twice that under two-level steps",
        ),
        "half-quadratic": Part(
            "regauge.formats.refits:HalfQuadratic",
            "the range of minmax, its zero moved so that few errors are large",
            "https://mobiusml.github.io/hqq_blog",
            cost="ten passes over the weights for each of twenty rounds",
        ),
        "deviation": Part(
            "regauge.formats.deviations:Deviation",
            "the root mean square of the group, times the share of some with the least squared error",
            short="tries",
            wants={"grid": ("trellis2", "trellis3", "trellis4")},
            cost="a rounding of the weights for each share",
        ),
        "learnt-clip": Part(
            "regauge.formats.learnt:LearntClip",
            "the range whose ends are clipped as training by the block's error finds best",
            "2308.13137",
            short="rate",
            text=True,
            cost="in each training step of a block, running it forward and backward on a batch of text",
        ),
        "learnt-share": Part(
            "regauge.formats.learnt:LearntShare",
            "the shares of both ends of the range that training by the block's error finds best",
            "2309.05516",
            short="rate",
            text=True,
            cost="in each training step of a block, running it forward and backward on a batch of text",
        ),
        "learnt-static": Part(
            "regauge.formats.learnt_steps:LearntStatic",
            "a static step whose scale and zero point training finds, from the range that calibration saw",
            "2408.13933",
            short="rate",
            wants={"grain": ("tensor", "group")},
            places=(INPUTS,),
            text=True,
            cost="in each training step a few passes over each input; none when the model runs",
        ),
        "learnt-reach": Part(
            "regauge.formats.reaches:LearntReach",
            "a share of the range of each call's own values, learnt for each tap by the block's error",
            "2410.09426",
            short="rate",
            places=(INPUTS,),
            text=True,
            cost="two passes over the activation in each call; in training running the block forward and backward",
        ),
        "dynamic": Part(
            "regauge.formats.rangers:Dynamic",
            "the range of each call's own values: [-a, a] on symmetric grids, else least to greatest",
            places=(INPUTS, CACHE),
            cost="two passes over the activation in each call",
        ),
        "ends": Part(
            "regauge.formats.offsets:Ends",
            "the range from least to greatest wherever it lies, with the least kept beside the step",
            "2402.02750",
            places=(CACHE,),
            cost="two passes over the values when tokens are put away",
        ),
        "static": Part(
            "regauge.formats.rangers:Static",
            "the range of all that calibration saw, known before the call and kept in the artifact",
            wants={"grain": ("tensor", "group")},
            places=(INPUTS,),
            text=True,
            cost="one pass over calibration text; none when the model runs",
        ),
    },
    "scale": SCALE_ROWS,
    "rounder": {
        "nearest": Part(
            "regauge.rounding.rounders:Nearest",
            "each weight takes the nearest code; needs no text",
            offers={WEIGHTS: ("nearest",)},
        ),
        "importance": Part(
            "regauge.rounding.rounders:ImportanceNearest",
            "nearest, with the step fitted where inputs and weights are large: E[x²] · √(spread σ² + w²)",
            wants={"ranger": ("search", "least-squares")},
            text=True,
            cost="one pass over calibration text",
        ),
        "clip": Part(
            "regauge.rounding.clipping:Clipped",
            "nearest, each group's range clipped where that lowers the error of the output",
            "2306.00978",
            text=True,
            cost="one pass over calibration text, ten roundings of the weights",
        ),
        "gptq": Part(
            "regauge.rounding.rounders:GPTQ",
            "column by column, the error of each pushed on to those not yet rounded",
            "2210.17323",
            text=True,
            cost="one pass over calibration text, a Cholesky factor of each tap's Hessian, O·I² to round a matrix",
        ),
        "retargeted": Part(
            "regauge.rounding.retargeting:Retargeted",
            "gptq towards what is best for the inputs of the model as compressed so far",
            short="share",
            text=True,
            cost="that of gptq, and the uncompressed model's blocks run beside",
        ),
        "gptq-levels": Part(
            "regauge.rounding.levels:Levels",
            "column by column as gptq, each code the best for all levels of a nested grid at once",
            "2210.17323",
            wants={"grid": ("nested",)},
            text=True,
            cost="that of gptq for each level, in torch, and least squares of each level's steps",
        ),
        "gptq-ordered": Part(
            "regauge.rounding.rounders:GPTQ",
            "column by column as gptq, large inputs first; each row keeps the best of four ranges",
            "2210.17323",
            fixed={"order": "activation", "static_groups": True, "tries": 4},
            offers={WEIGHTS: ("gptq-ordered",)},
            beside={"ranger": "minmax"},
            text=True,
            cost="as gptq, with four times its O·I² at 4 bits and less",
        ),
        "learnt-offset": Part(
            "regauge.rounding.learnt:LearntOffset",
            "nearest after an offset for each weight that training by the block's error finds best",
            "2309.05516",
            short="start",
            refuses={"grid": UNEVEN},
            text=True,
            cost="in each training step of a block, running it forward and backward on a batch of text",
        ),
        "learnt-levels": Part(
            "regauge.rounding.learnt_levels:LearntLevels",
            "offsets of weights, and steps of levels, that training by a block's errors at several levels finds best",
            "2502.06786",
            short="start",
            wants={"grid": ("nested",)},
            text=True,
            cost="in each training step of a block, running it forward and backward on a batch of text for each level",
        ),
        "learnt-side": Part(
            "regauge.rounding.sides:LearntSide",
            "the code below each weight or the one above, as training by the block's error finds best",
            "2004.10568",
            short="rate",
            refuses={"grid": UNEVEN},
            text=True,
            cost="in each training step of a block, running it forward and backward on a batch of text",
        ),
    },
    "compensator": {
        "lorc": Part(
            "regauge.rounding.compensators:LoRC",
            "the error's best approximation of low rank, added back",
            "2307.09782",
            short="rank",
            term="low-rank",
            cost="one SVD a matrix; rank · (O + I) more products a token",
        ),
        "low-rank-weighted": Part(
            "regauge.rounding.compensators:WeightedLowRank",
            "what of low rank leaves the output the least error, added back",
            "2410.06040",
            short="rank",
            term="low-rank",
            text=True,
            cost="one pass over calibration text, a Cholesky factor and an SVD a matrix; rank · (O + I) more products "
            "a token",
        ),
        "phases": Part(
            "regauge.rounding.compensators:PhasesLeft",
            "what rounding leaves as complex entries 1, i, -1, -i, a bit a weight and pass",
            "2512.02901",
            short="passes",
            term="phases",
            cost="a few passes over the weights; sums of inputs by sign in torch's modules, no native step",
        ),
    },
    "transform": TRANSFORM_ROWS,
    **SHAPE_ROWS,
    **CACHE_ROWS,
    **ATTENTION_ROWS,
    "score": {**SHAPE_ROWS["score"], **CACHE_ROWS["score"], **TOKEN_ROWS["score"]},
    "schedule": {**SHAPE_ROWS["schedule"], **TOKEN_ROWS["schedule"]},
    "disposal": {**CACHE_ROWS["disposal"], **TOKEN_ROWS["disposal"]},
    "rewrite": REWRITE_ROWS,
    ARITHMETIC: {
        "l-mul": Part(
            "regauge.measure.arithmetic:LMul",
            "products by adding exponents and mantissas of so many bits",
            "2410.00907",
            short="bits",
            places=(MEASURE,),
            cost="up to 2^bits products for one; what a model loses by it is measured, nothing runs faster",
        ),
    },
}
