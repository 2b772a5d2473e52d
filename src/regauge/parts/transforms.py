"""The lines of the transforms: what an input is multiplied by before it is rounded, while the model runs."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import CACHE, INPUTS

TRANSFORM_ROWS: Mapping[str, Part] = {
    "identity": Part("regauge.formats.transforms:Identity", "the activation as it is", places=(INPUTS,)),
    "hadamard": Part(
        "regauge.formats.transforms:Hadamard",
        "each channel spread over all by a Hadamard matrix, while the model runs",
        "2404.00456",
        places=(INPUTS, CACHE),
        cost="n log n a token, in float32, before the products",
    ),
    "diagonal": Part(
        "regauge.formats.transforms:Diagonal",
        "each channel divided by its own number, while the model runs, where none can be folded",
        "2211.10438",
        short="alpha",
        places=(INPUTS,),
        text=True,
        cost="one product a channel; one pass over calibration text",
    ),
    "kronecker": Part(
        "regauge.formats.kronecker:LearntKronecker",
        "two small matrices, learnt by the error of the block's output, while the model runs",
        "2410.09426",
        short="rate",
        places=(INPUTS,),
        text=True,
        cost="I (a + b) products a token, I = a b; in training two small inverses and a pass over the weights",
    ),
}
