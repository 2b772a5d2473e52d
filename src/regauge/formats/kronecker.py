"""A transform of an input that is learnt: two small matrices, trained with what is learnt of the matrices that read it.

Legend: I channels, I = a · b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import OBJECTIVE
from regauge.formats.hadamard import straight
from regauge.formats.transforms import Crossed, shaped

LEFT, RIGHT = "left", "right"
STARTS = ("hadamard", "identity")


@dataclass(frozen=True)
class LearntKronecker:
    """A learnt affine of the channels, x → x (left ⊗ right), and its inverse folded into every matrix that reads x
    (FlatQuant, arXiv 2410.09426, its P₁ and P₂), trained by the error of the block's output with weights and inputs
    rounded. `left` is (a, a) and `right` (b, b), a · b the channels, the pair of factors nearest to a square.

    Training begins at Hadamard matrices, or the nearest thing to them (see `formats/hadamard.py`), so that what is kept
    is no worse on the calibration text than that; or at the identity.

    Differs: both matrices are trained as they are and inverted, where the released code's default has them as U diag Vᵀ
    with U and V by Cayley's map, begun at random; scales a channel and the clip of the input are parts of their
    own (`learnt-equivalence`, `learnt-reach`).
    Cost: I (a + b) products a token while the model runs; in training two small inverses and a pass over the weights.

    Attributes:
        rate: learning rate, of AdamW; the published 0.005.
        start: `hadamard` or `identity`.
    """

    rate: float = 0.005
    start: str = "hadamard"

    def __post_init__(self) -> None:
        if not self.rate >= 0:
            raise ValueError(f"a learning rate is 0 or more, not {self.rate}")
        if self.start not in STARTS:
            raise ValueError(f"training begins at {' or '.join(STARTS)}, not at {self.start!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({OBJECTIVE})

    @property
    def rates(self) -> Mapping[str, float | None]:
        return {LEFT: self.rate, RIGHT: self.rate}

    def fit(self, channels: int, stats: Mapping[str, Tensor], weights: Sequence[Tensor]) -> Crossed:
        """The transform before training."""
        return self.apply(self.init(channels))

    def init(self, channels: int) -> dict[str, Tensor]:
        """Where training begins, float32."""
        a, b = factors(channels)
        return {LEFT: self._begin(a), RIGHT: self._begin(b)}

    def apply(self, parameters: Mapping[str, Tensor]) -> Crossed:
        """The transform under these parameters, differentiable."""
        return Crossed(parameters[LEFT], parameters[RIGHT])

    def load(self, channels: int, tensors: Mapping[str, Tensor]) -> Crossed:
        a, b = factors(channels)
        return Crossed(shaped(tensors, LEFT, (a, a)), shaped(tensors, RIGHT, (b, b)))

    def _begin(self, size: int) -> Tensor:
        if self.start == "identity":
            return torch.eye(size, dtype=torch.float32, device="cpu")
        return straight(size)[0].matrix().T.float().contiguous()


def factors(channels: int) -> tuple[int, int]:
    """(a, b) with a · b the channels, a ≤ b and as near to each other as can be."""
    a = next(size for size in range(math.isqrt(channels), 0, -1) if channels % size == 0)
    return a, channels // a
