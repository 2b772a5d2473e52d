"""Scores of neurons: higher = keep. Legend: T tokens, N neurons, O outputs of down, I inputs of up and gate."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.anatomy.model import Stream, Weights
from regauge.prune.base import Stats, statistic


@dataclass(frozen=True)
class Random:
    """By lot: what every other score must beat. Another draw in each stream, the same for the same seed."""

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, stream: Stream, weights: Weights, stats: Stats) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {stream.name}".encode()))
        return torch.rand(stream.size, generator=generator, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Magnitude:
    """s_j = √(‖up_j:‖² + ‖gate_j:‖² + ‖down_:j‖²), the length of all weights of a neuron. Reads no text.

    Reference: group L2 norm of DepGraph (2301.12900), without its normalisation by group size: all groups here are of
    one size. Blind to how often and how strongly a neuron fires, and changed by moving a scale from up to down, which
    changes nothing else.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, stream: Stream, weights: Weights, stats: Stats) -> Tensor:
        total_N = torch.zeros(stream.size, dtype=torch.float64, device="cpu")
        for port in (*stream.writers, *stream.through, *stream.readers):
            if port.tensor.endswith(".weight"):
                total_N += weights[port.tensor].to(torch.float64).square().sum(1 - port.axis)
        return total_N.sqrt()


@dataclass(frozen=True)
class Activation:
    """s_j = ‖x_j‖₂ · ‖down_:j‖₂ / √T: the error that dropping neuron j alone makes at the output of down, a token.

    ‖X_:j down_:jᵀ‖_F² = ‖x_j‖² ‖down_:j‖² holds exactly; that errors of several neurons add is the assumption, and
    what `repair: least-squares` makes up for. A scale moved from up to down leaves it as it is.

    Reference: |W_ij| · ‖X_j‖₂ of Wanda (2306.11695), its squares summed over the column as FLAP (2312.11983) does to
    take whole neurons; FLAP uses the variance of x_j and adds the mean to a bias, which we do not.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def __call__(self, stream: Stream, weights: Weights, stats: Stats) -> Tensor:
        (port,) = stream.readers
        moment_N = statistic(stats, "second_moment", "score 'activation'").to(torch.float64)
        energy_N = weights[port.tensor].to(torch.float64).square().sum(1 - port.axis)
        return (moment_N * energy_N).sqrt()
