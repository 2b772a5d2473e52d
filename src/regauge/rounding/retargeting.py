"""Error feedback on the target that is best for the inputs that the compressed model really sees.

Legend: O output channels, I input channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format
from regauge.rounding.base import DRIFT, Stats
from regauge.rounding.compensators import root
from regauge.rounding.rounders import GPTQ


@dataclass(frozen=True)
class Retargeted:
    """GPTQ on W* = W + share · W D (H + λI)⁻¹, D = E[(x − x̂) x̂ᵀ], H = E[x̂ x̂ᵀ].

    x̂ is what this site reads in the model compressed so far, x what it reads in the uncompressed one. At share 1 plain
    feedback on W* is the exact minimum of ‖W X − Ŵ X̂‖, so errors of earlier blocks are made good; GPTAQ (arXiv
    2504.02692) approximates it inside the sweep, column by column. Where both read the same, or nothing is known of the
    other, it is GPTQ to the bit.

    W* shrinks what the drift made noise of, and what is made good here may have cancelled later: judge a share by the
    loss of the whole model. Cost: that of GPTQ, a second factor, and the uncompressed model's states beside.

    Attributes:
        share: of the way to W*.
        damp, order, static_groups, tries: as GPTQ has them.
    """

    share: float = 1.0
    damp: float = 0.01
    order: str = "none"
    static_groups: bool = False
    tries: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of the way is from 0 to 1, not {self.share:g}")
        self._plain()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian", DRIFT})

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return self._plain().sweeps(fmt, shape)

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        plain = self._plain()
        drift_II = stats.get(DRIFT)
        if drift_II is None:
            note = "nothing is known of what the uncompressed model reads there, so it was rounded as by gptq"
            codes = plain(w_OI, fmt, stats)
            return replace(codes, notes=(*codes.notes, note))
        if self.share == 0 or not bool(drift_II.any()):
            return plain(w_OI, fmt, stats)
        return plain(target(w_OI, stats["hessian"], drift_II, self.share, self.damp), fmt, stats)

    def _plain(self) -> GPTQ:
        return GPTQ(self.damp, self.order, self.static_groups, tries=self.tries)


def target(w_OI: Tensor, hessian_II: Tensor, drift_II: Tensor, share: float, damp: float) -> Tensor:
    """W + share · W D (H + λI)⁻¹, in the dtype of W; λ the share `damp` of H's mean diagonal."""
    lower_II = root(hessian_II.to(w_OI.device), damp)
    solved_II = torch.cholesky_solve(drift_II.to(lower_II).T, lower_II)  # (H + λI)⁻¹ Dᵀ
    return w_OI + share * (w_OI.double() @ solved_II.T).to(w_OI.dtype)
