"""A router that sends each prompt to one of a few members (APTP, arXiv 2406.12042): what the loop solves for it.

A prompt is told by numbers that cost nothing, the mean of its embeddings. A linear map gives each member a score; while
it is trained, prompts are assigned by optimal transport, so that each member has its share of them, and the loss is
what the members lose on the prompts that they are assigned. Shares follow from a budget: of all that meet a mean
compute, the most even. What transport charges for each member stays as its bias, so that shares hold where prompts come
one by one.

Differs: the paper learns the members too, and has no bias where a prompt comes alone.

Legend: B prompts, K members, R numbers of a prompt, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.learn.base import Parameters, Rates

WEIGHT = "weight"
RATE, BEGUN, STEPS = 0.05, 0.01, 200
ROUNDS, SHARP = 30, 50.0
"""Rounds of Sinkhorn's algorithm, and how much harder scores are where prompts come one by one."""
NUMBERS = 16
"""The most that a prompt is told by: few prompts are seen, and a map of more fits to them alone."""


def shares_for(costs: Sequence[float], budget: float) -> Tensor:
    """(K,): of all shares whose mean cost is the budget, the most even: q ∝ exp(−λ c).

    Raises:
        ValueError: no shares have it, in a sentence.
    """
    if not min(costs) < budget < max(costs):
        raise ValueError(
            f"members cost {min(costs):.2f} to {max(costs):.2f} of the whole, so a mean of {budget} lies not between: "
            "say another route, or other members"
        )
    cost_K = torch.tensor(costs, dtype=torch.float64, device="cpu")
    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        mean = float((torch.softmax(-middle * cost_K, 0) * cost_K).sum())
        low, high = (middle, high) if mean > budget else (low, middle)
    return torch.softmax(-low * cost_K, 0).float()


def transported(score_BK: Tensor, share_K: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Each prompt's parts to members (B, K), which sum to 1, and what each member charges (K,): Sinkhorn's algorithm,
    whose columns have their shares of the prompts. Differentiable in the scores."""
    price_K = torch.zeros_like(share_K)
    for _ in range(rounds):
        taken_B1 = (score_BK - price_K).logsumexp(1, keepdim=True)
        price_K = (score_BK - taken_B1).logsumexp(0) - (share_K * len(score_BK)).log()
    return torch.softmax(score_BK - price_K, 1), price_K


@dataclass(frozen=True, eq=False)
class Lot:
    """Prompts that were seen: what tells them (B, D), and what each member loses on what follows (B, K)."""

    told_BD: Tensor
    lost_BK: Tensor


@dataclass(frozen=True, eq=False)
class Basis:
    """What is kept of the numbers of a prompt: its directions of most variance, each of variance 1, and a 1."""

    mean_D: Tensor
    axes_DR: Tensor

    @staticmethod
    def of(told_BD: Tensor, most: int = NUMBERS) -> Basis:
        mean_D = told_BD.mean(0)
        _, sizes, axes = torch.linalg.svd(told_BD - mean_D, full_matrices=False)
        count = min(most, max(1, len(told_BD) // 8), int((sizes > 1e-6 * sizes[0]).sum()) or 1)
        wide_R = (sizes[:count] / math.sqrt(max(len(told_BD) - 1, 1))).clamp_min(1e-12)
        return Basis(mean_D, axes[:count].T / wide_R)

    def __call__(self, told_BD: Tensor) -> Tensor:
        kept_BR = (told_BD - self.mean_D) @ self.axes_DR
        return torch.cat([kept_BR, torch.ones_like(kept_BR[:, :1])], 1)


@dataclass(frozen=True, eq=False)
class Routing:
    """The training of a router, as `learn.base.Problem`.

    Attributes:
        first: prompts to learn from; second: held out, by which the best is kept.
        share_K: of the prompts, for each member.
    """

    first: Lot
    second: Lot
    share_K: Tensor
    basis: Basis
    seed: int = 0

    @property
    def rates(self) -> Rates:
        return {WEIGHT: RATE}

    @property
    def batches(self) -> int:
        return 1

    def init(self) -> Parameters:
        """Nearly nothing: prompts go by lot, each the same way again."""
        size = (self.basis.axes_DR.shape[1] + 1, len(self.share_K))
        made = torch.Generator().manual_seed(self.seed)
        return {WEIGHT: BEGUN * torch.randn(size, generator=made, dtype=torch.float32, device="cpu")}

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        return self._lost(parameters, self.first)

    def error(self, parameters: Parameters) -> float:
        return float(self._lost(parameters, self.second))

    def _lost(self, parameters: Parameters, lot: Lot) -> Tensor:
        plan_BK, _ = transported(self.basis(lot.told_BD) @ parameters[WEIGHT], self.share_K)
        return (plan_BK * lot.lost_BK).sum(1).mean()

    def finish(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """(K, D) and (K,): a prompt goes to the member of the most told · weight + bias."""
        weight_DK = self.basis.axes_DR @ parameters[WEIGHT][:-1]
        bias_K = parameters[WEIGHT][-1] - self.basis.mean_D @ weight_DK
        score_BK = self.first.told_BD @ weight_DK + bias_K
        hard = SHARP / max(float(score_BK.std(0).mean()), 1e-9)
        _, price_K = transported(hard * score_BK, self.share_K, 20 * ROUNDS)
        return weight_DK.T.contiguous(), bias_K - price_K / hard
