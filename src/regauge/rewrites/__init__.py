"""Rewrites: choices of function-preserving moves."""

from regauge.rewrites.base import Rewrite, fixed
from regauge.rewrites.equivalence import LearntEquivalence
from regauge.rewrites.levelling import Level
from regauge.rewrites.norms import FoldBatchNorm, FoldNorm, LayerNormToRMS
from regauge.rewrites.permutation import PermuteByImportance
from regauge.rewrites.planting import PlantOutliers
from regauge.rewrites.reading import SmoothReaders
from regauge.rewrites.rotation import RotateHadamard
from regauge.rewrites.shifting import GainBiases, ShiftScale
from regauge.rewrites.smoothing import SmoothNorms, SmoothStreams

__all__ = [
    "FoldBatchNorm",
    "FoldNorm",
    "GainBiases",
    "LayerNormToRMS",
    "LearntEquivalence",
    "Level",
    "PermuteByImportance",
    "PlantOutliers",
    "Rewrite",
    "RotateHadamard",
    "ShiftScale",
    "SmoothNorms",
    "SmoothReaders",
    "SmoothStreams",
    "fixed",
]
