"""Repairs: what is done to the weights that read the units that stay. Legend: O outputs, N units, K kept, D dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.prune.base import Stats, statistic


@dataclass(frozen=True)
class Nothing:
    """The weights that stay, as they are."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, w_ON: Tensor, kept_K: Tensor, stats: Stats) -> Tensor:
        return w_ON[:, kept_K]


@dataclass(frozen=True)
class LeastSquares:
    """The weights that give back the most of what the layer wrote with all its units.

    min over W′ of ‖X Wᵀ − X_K W′ᵀ‖² + λ‖W′ − W_K‖², so W′ = W_K + W_D H_DK (H_KK + λI)⁻¹ with H = XᵀX / T: units that
    stay take over what they can tell of those that went. λ is `damp` times the mean of H's diagonal. Where the units
    are uncorrelated, or none went, W′ = W_K.

    Cost: XᵀX of the layer's inner width, a Cholesky factor of its kept part.
    Reference: the optimum for a fixed mask, as in OBS and its structured form ZipLM (2302.04089). They take units one
    by one and score again after each; here all go at once. λ pulls to W_K, not to 0.
    """

    damp: float = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError(f"damp is above 0; you wrote {self.damp:g}")

    def __call__(self, w_ON: Tensor, kept_K: Tensor, stats: Stats) -> Tensor:
        h_NN = statistic(stats, "hessian", "repair 'least-squares'").to(torch.float64)
        dropped_D = (
            torch.ones(len(h_NN), dtype=torch.bool, device="cpu").index_fill_(0, kept_K, False).nonzero().flatten()
        )
        w_ON = w_ON.to(torch.float64)
        w_OK = w_ON[:, kept_K]
        ridge = self.damp * float(h_NN.diagonal().mean())
        if not len(dropped_D) or ridge <= 0:  # nothing went, or nothing was ever read
            return w_OK
        h_KK = h_NN[kept_K[:, None], kept_K]
        h_KK.diagonal().add_(ridge)
        told_OK = w_ON[:, dropped_D] @ h_NN[dropped_D[:, None], kept_K]
        added_KO = torch.cholesky_solve(told_OK.T, torch.linalg.cholesky(h_KK))
        return w_OK + added_KO.T
