"""The lines of the rewrites: choices of moves that keep the function, and `latent`, which does at `keep: 1` alone."""

from __future__ import annotations

from collections.abc import Mapping

from regauge.parts.part import Part
from regauge.parts.points import REWRITES

REWRITE_ROWS: Mapping[str, Part] = {
    "fold-norm": Part(
        "regauge.rewrites.norms:FoldNorm",
        "gain and bias of each norm go into its readers",
        "2404.00456",
        places=(REWRITES,),
    ),
    "fold-batch-norm": Part(
        "regauge.rewrites.norms:FoldBatchNorm",
        "each batch norm goes into the convolution before it",
        "1712.05877",
        places=(REWRITES,),
    ),
    "layernorm-to-rms": Part(
        "regauge.rewrites.norms:LayerNormToRMS",
        "centred writers of the residual make LayerNorm an RMSNorm",
        "2305.14858",
        places=(REWRITES,),
    ),
    "smooth-norms": Part(
        "regauge.rewrites.smoothing:SmoothNorms",
        "scales behind each norm move outliers from inputs to weights",
        "2211.10438",
        short="alpha",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text",
    ),
    "smooth-streams": Part(
        "regauge.rewrites.smoothing:SmoothStreams",
        "every scalable stream smoothed, one strength for the model by its own loss",
        "2312.03788",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text, and one of the whole model for each strength tried",
    ),
    "smooth-readers": Part(
        "regauge.rewrites.reading:SmoothReaders",
        "mean inputs of each set of readers to a power that loses least where these alone are rounded",
        "2306.00978",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text, and 20 runs of a block for each of up to four sets of readers",
    ),
    "gain-biases": Part(
        "regauge.rewrites.shifting:GainBiases",
        "biases of zeros for norms, values and what reads them, so that a shift has a place",
        places=(REWRITES,),
        cost="an addition a matrix and a norm; no stock loader",
    ),
    "shift-scale": Part(
        "regauge.rewrites.shifting:ShiftScale",
        "channels moved to the middle of their range, and those beyond a threshold brought down to it",
        "2304.09145",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text, and 21 runs of a block for each of up to four sets of readers",
    ),
    "learnt-scales": Part(
        "regauge.rewrites.joining:LearntScales",
        "a scale a channel of norms, values, keys and neurons, trained towards the original's output",
        "2408.13933",
        short="rate",
        places=(REWRITES,),
        text=True,
        cost="in each training step of the whole model, a pass over its weights",
    ),
    "learnt-equivalence": Part(
        "regauge.rewrites.equivalence:LearntEquivalence",
        "scales and shifts of streams, trained with the block",
        "2308.13137",
        short="rate",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text, and in each training step a pass over the block's weights",
    ),
    "level": Part(
        "regauge.rewrites.levelling:Level",
        "each norm's channels moved so that one step gives the codes that a step each would have",
        "2402.05628",
        short="bits",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text",
    ),
    "rotate": Part(
        "regauge.rewrites.rotation:RotateHadamard",
        "residual and values turned by a Hadamard matrix",
        "2404.00456",
        places=(REWRITES,),
    ),
    "latent": Part(
        "regauge.rewrites.latent:LatentAttention",
        "keys and values of all heads in one narrow vector a token, which is what the cache holds",
        "2502.07864",
        short="keep",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text; larger matrices of queries; no native step",
    ),
    "permute": Part(
        "regauge.rewrites.permutation:PermuteByImportance",
        "channels sorted so that the prefix matters most",
        places=(REWRITES,),
        text=True,
        cost="one pass over calibration text",
    ),
    "plant-outliers": Part(
        "regauge.rewrites.planting:PlantOutliers",
        "a few channels made loud, as in large models: what other rewrites are tried on, never a gain",
        short="strength",
        places=(REWRITES,),
    ),
}
