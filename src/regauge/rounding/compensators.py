"""What is added back for the error of rounding.

Legend: O output channels, I input channels, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Term
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
