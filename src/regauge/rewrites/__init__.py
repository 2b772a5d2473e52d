"""Rewrites: choices of function-preserving moves."""

from regauge.rewrites.base import Rewrite, fixed
from regauge.rewrites.norms import FoldNorm, LayerNormToRMS
from regauge.rewrites.permutation import PermuteByImportance
from regauge.rewrites.planting import PlantOutliers
from regauge.rewrites.reading import SmoothReaders
from regauge.rewrites.rotation import RotateHadamard
from regauge.rewrites.smoothing import SmoothNorms, SmoothStreams

__all__ = [
    "FoldNorm",
    "LayerNormToRMS",
    "PermuteByImportance",
    "PlantOutliers",
    "Rewrite",
    "RotateHadamard",
    "SmoothNorms",
    "SmoothReaders",
    "SmoothStreams",
    "fixed",
]
