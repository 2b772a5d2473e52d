"""What is added back for the error of rounding.

Legend: O output channels, I input channels, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.formats.base import Term
from regauge.formats.phases import phases
from regauge.formats.terms import LowRank
from regauge.rounding.base import Stats


@dataclass(frozen=True)
class LoRC:
    """The best approximation of rank `rank` of E = W − Ŵ, added back (ZeroQuant-FP, arXiv 2307.09782, LoRC).

    E ≈ U_R V_R; the square roots of the singular values go to both factors, so that both have like ranges. In float32
    the sum of squares left is that of the singular values cut off, and no matrix of that rank leaves less (Eckart and
    Young); the factors as stored, in bfloat16, come within their rounding of it.

    Cost: one SVD of E, O·I·min(O, I).
    """

    rank: int
    again: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"a rank is 1 or more, not {self.rank}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def bytes(self, shape: tuple[int, int]) -> int:
        """Both factors in bfloat16."""
        return 2 * min(self.rank, *shape) * sum(shape)

    def __call__(self, w_OI: Tensor, w_hat_OI: Tensor, stats: Stats) -> tuple[Term, ...]:
        """One low-rank term in bfloat16: W ≈ Ŵ + left @ right."""
        left_OR, right_RI = low_rank(w_OI.float() - w_hat_OI.float(), self.rank)
        return (LowRank(left_OR.to(torch.bfloat16), right_RI.to(torch.bfloat16)),)


def low_rank(e_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, R), (R, I) of the best approximation of this rank, at most the full one."""
    u_OK, s_K, v_KI = torch.linalg.svd(e_OI, full_matrices=False)
    rank = min(rank, len(s_K))
    root_R = s_K[:rank].sqrt()
    return u_OK[:, :rank] * root_R, root_R[:, None] * v_KI[:rank]


@dataclass(frozen=True)
class WeightedLowRank:
    """The matrix of rank `rank` that, added to Ŵ, leaves the least ‖(W − Ŵ − A B) X‖ (QERA-exact, arXiv 2410.06040).

    With R = E[x xᵀ] = L Lᵀ by Cholesky and (W − Ŵ) L = U S Vᵀ: A = U_r √S_r, B = √S_r V_rᵀ L⁻¹; what is left is
    Σ s_i² over i > r, and no matrix of that rank leaves less. `lorc` is the same with R = 1; where R is diagonal it is
    the diagonal form (QERA-approx; LQER, arXiv 2402.02446, weighs by E|x| instead).

    Cost: one pass over calibration text; I³/3 for the factor, an SVD of (O, I); an `again` is a rounding and an SVD.
    Differs: `damp` times the mean diagonal is added to R, which must have a factor and whose weakest directions would
    otherwise make B's largest entries, and their rounding to bfloat16 an error of the strong ones.

    Attributes:
        again: how often W − A B is rounded anew, and A B taken for what that leaves; the engine keeps what leaves the
            output the least error, as with coarse steps it often is the first.
    """

    rank: int
    again: int = 0
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.rank < 1 or self.again < 0 or self.damp < 0:
            told = f"{self.rank}, {self.again} and {self.damp:g}"
            raise ValueError(f"a rank is 1 or more, again and damp are 0 or more, not {told}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def bytes(self, shape: tuple[int, int]) -> int:
        """Both factors in bfloat16."""
        return 2 * min(self.rank, *shape) * sum(shape)

    def __call__(self, w_OI: Tensor, w_hat_OI: Tensor, stats: Stats) -> tuple[Term, ...]:
        """One low-rank term in bfloat16: W ≈ Ŵ + left @ right."""
        lower_II = root(stats["hessian"].to(w_OI.device), self.damp).float()
        left_OR, right_RI = weighted_low_rank(w_OI.float() - w_hat_OI.float(), lower_II, self.rank)
        return (LowRank(left_OR.to(torch.bfloat16), right_RI.to(torch.bfloat16)),)


@dataclass(frozen=True)
class PhasesLeft:
    """What rounding leaves, in its widely linear form with entries ±1 and ±i (Fairy2i, arXiv 2512.02901), pass by pass.

    W − Ŵ as U x + V x̄, each complex entry on the nearest axis with a step for the real and one for the imaginary, again
    on what that leaves: one bit a weight and pass. The product adds and subtracts inputs and multiplies sums by steps.

    Cost: a few passes over the weights; the packed modules multiply by signs in torch, and the native step has it not.
    Differs: the paper trains so and has nothing beside the passes; this rounds what exists, behind a grid's codes.
    """

    passes: int = 1
    again: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= 8:
            raise ValueError(f"passes are 1 to 8, not {self.passes}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def bytes(self, shape: tuple[int, int]) -> int:
        """A bit a weight and four steps in float32, each pass."""
        return self.passes * (shape[0] * shape[1] // 8 + 16)

    def __call__(self, w_OI: Tensor, w_hat_OI: Tensor, stats: Stats) -> tuple[Term, ...]:
        """One term of that kind."""
        return (phases(w_OI.float() - w_hat_OI.float(), self.passes),)


def root(moment_II: Tensor, damp: float) -> Tensor:
    """L of R + λI = L Lᵀ, float64, λ the share `damp` of R's mean diagonal, ten times more as often as it takes."""
    r_II = moment_II.double()
    mean = float(r_II.diagonal().mean())
    if not 0 < mean < float("inf"):
        return torch.eye(len(r_II), dtype=torch.float64, device=r_II.device)
    share = damp
    while True:
        lower_II, failed = torch.linalg.cholesky_ex(
            r_II + share * mean * torch.eye(len(r_II), dtype=torch.float64, device=r_II.device)
        )
        if not int(failed):
            return lower_II  # type: ignore[no-any-return]  # torch's own
        share = max(share, 1e-9) * 10


def weighted_low_rank(e_OI: Tensor, lower_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (O, R), (R, I) of the matrix of this rank with the least ‖(E − A B) L‖."""
    left_OR, right_RI = low_rank(e_OI @ lower_II, rank)
    solved_RI: Tensor = torch.linalg.solve_triangular(lower_II, right_RI, upper=False, left=False)
    return left_OR, solved_RI
