"""Ranges clipped where that lowers the error of the layer's output.

Legend: O output channels, I input channels, G groups, K weights in a group, N groups along a row, S inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Step, reach
from regauge.formats.rangers import either
from regauge.rounding.base import Stats

SHARES = tuple(round(1 - 0.05 * i, 2) for i in range(10))
"""1, 0.95, …, 0.55 of a group's largest magnitude, as AWQ's released code tries them."""


@dataclass(frozen=True)
class Clipped:
    """Nearest, each group within the share of its largest magnitude that costs the least (AWQ, arXiv 2306.00978).

    What it costs is E[(Σ_j (w_j − ŵ_j) x_j)²] over the inputs j of the group, e H_BB eᵀ: the error of the output as far
    as this group makes it. Weights beyond the clipped range take its ends. Never worse than not clipping under that
    measure; of equals the widest.

    Cost: one pass over calibration text; for each of `SHARES` a fit, a rounding, and K multiply-adds a weight.
    Differs: the released code takes at most 512 tokens, this all; attention's q and k are not clipped there, which a
    recipe says by giving them another rounder.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian"})

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        return 0

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
        fmt = fmt.bound(w_OI)
        blocks_NSS = _blocks(stats["hessian"].to(w_OI.device).float(), fmt.grain.span((w_OI.shape[0], w_OI.shape[1])))
        most_G1 = reach(fmt.grain.split(w_OI))
        best = fmt.fit(w_OI)
        least_G1 = _error(w_OI, fmt, best, blocks_NSS)
        for share in SHARES[1:] if fmt.step is None else ():
            end_G1 = (most_G1 * share).to(w_OI.dtype)
            clipped_OI = fmt.grain.join(fmt.grain.split(w_OI).clamp(-end_G1, end_G1), w_OI)
            step = fmt.fit(clipped_OI)
            error_G1 = _error(w_OI, fmt, step, blocks_NSS)
            best = either(error_G1 < least_G1, step, best)
            least_G1 = torch.minimum(error_G1, least_G1)
        return fmt.encode(w_OI, best)


def _blocks(hessian_II: Tensor, span: int) -> Tensor:
    """What the inputs of each group along a row are to each other, (N, S, S)."""
    inputs = hessian_II.shape[0]
    return torch.stack([hessian_II[i : i + span, i : i + span] for i in range(0, inputs, span)])


def _error(w_OI: Tensor, fmt: Format, step: Step, blocks_NSS: Tensor) -> Tensor:
    """e H_BB eᵀ of each group, (G, 1)."""
    e_ONS = (w_OI.float() - fmt.decode(fmt.encode(w_OI, step))).reshape(w_OI.shape[0], *blocks_NSS.shape[:2])
    cost_ONS = e_ONS * torch.einsum("ons,nst->ont", e_ONS, blocks_NSS)
    return fmt.grain.split(cost_ONS.reshape(w_OI.shape)).sum(1, keepdim=True)
