"""The lines of the axes of shape: what is taken out of a model."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import SHAPE

SHAPE_ROWS: Mapping[str, Mapping[str, Part]] = {
    "unit": {
        "neuron": Part(
            "regauge.prune.units:Neuron",
            "a neuron of a feed-forward layer: a row of up and gate, a column of down",
            places=(SHAPE,),
        ),
    },
    "score": {
        "random": Part(
            "regauge.prune.scores:Random", "by lot: what any other score must beat", short="seed", places=(SHAPE,)
        ),
        "magnitude": Part(
            "regauge.prune.scores:Magnitude", "the length of all weights of a unit", "2301.12900", places=(SHAPE,)
        ),
        "activation": Part(
            "regauge.prune.scores:Activation",
            "what the layer's output loses with the unit: ‖x‖·‖down‖",
            "2306.11695",
            places=(SHAPE,),
            text=True,
            cost="one pass over calibration text",
        ),
    },
    "allocation": {
        "uniform": Part(
            "regauge.prune.allocations:Uniform",
            "the same share stays in every block, rounded to what kernels like",
            short="keep",
            places=(SHAPE,),
        ),
        "global": Part(
            "regauge.prune.allocations:Global",
            "one threshold for all blocks, so that some keep more than others",
            "2312.11983",
            short="keep",
            places=(SHAPE,),
            text=True,
            cost="one more pass over calibration text; stock formats cannot say the sizes",
        ),
    },
    "schedule": {"once": Part("regauge.prune.schedules:Once", "all at once", places=(SHAPE,))},
    "repair": {
        "none": Part("regauge.prune.repairs:Nothing", "the weights that stay, as they are", places=(SHAPE,)),
        "least-squares": Part(
            "regauge.prune.repairs:LeastSquares",
            "down solved anew on the units that stay, so that they stand in for those that went",
            "2302.04089",
            short="damp",
            places=(SHAPE,),
            text=True,
            cost="one pass over calibration text, XᵀX of the layer's inner width and its Cholesky factor",
        ),
    },
}
