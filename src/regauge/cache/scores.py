"""Scores of cached tokens: higher = keep. They read what a head holds and the newest queries, and never run a model.

Legend: B sequences, H KV heads, G query heads of one, Q newest queries, T tokens held, D head size, F future positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from regauge.anatomy.values import pair_slices
from regauge.cache.base import Rotary, Seen, probabilities
from regauge.cache.kinds import SHARE, check_kinds, contextual_BH, named_BH


@dataclass(frozen=True)
class _Sinks:
    """The option that scores share.

    Args:
        sinks: tokens at the front that are never taken.
    """

    sinks: int = 0
    turns: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _at_least("sinks", self.sinks, 0)


@dataclass(frozen=True)
class Random(_Sinks):
    """By lot: what every other score must beat. Another draw for each head, the same for the same seed and sizes."""

    seed: int = 0
    queries: ClassVar[int] = 0

    def __call__(self, seen: Seen) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(seen.positions_BHT.shape, generator=generator, dtype=torch.float32, device="cpu").to(
            seen.keys_BHTD.device
        )


@dataclass(frozen=True)
class Recency(_Sinks):
    """The newest, and the sinks in front: attention sinks (StreamingLLM, 2309.17453), which keeps four.

    Positions stay the tokens' own; the paper counts them anew within the cache, so that a text may be longer than the
    model's positions. Costs nothing.
    """

    sinks: int = 4
    queries: ClassVar[int] = 0

    def __call__(self, seen: Seen) -> Tensor:
        return seen.positions_BHT.float()


@dataclass(frozen=True)
class KeyNorm(_Sinks):
    """-‖k‖₂: keys of small norm draw attention (2406.11430). Reads no queries.

    The paper keeps the first two layers whole, which a recipe says by a rule of its own.
    """

    sinks: int = 4
    queries: ClassVar[int] = 0

    def __call__(self, seen: Seen) -> Tensor:
        return -_norm(seen.keys_BHTD)


@dataclass(frozen=True)
class WindowAttention(_Sinks):
    """Mean attention of the newest queries, smoothed over neighbours: SnapKV (2404.14469, eq. 1 and its pooling).

    A token counts as its neighbourhood does, so that what stays is stretches of text. The mean over the query heads
    that share a KV head is from kvpress; the paper's models have none.

    Args:
        queries: of the newest tokens, the paper's observation window of 16 to 64.
        pool: width of the mean over neighbours, odd; 1: none. The paper's is 5 to 7.
    """

    queries: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("queries", self.queries, 1)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool is an odd number of tokens, 1 for none; you wrote {self.pool}")

    def __call__(self, seen: Seen) -> Tensor:
        mean_BHT = probabilities(seen).mean((2, 3))
        return avg_pool1d(mean_BHT, self.pool, 1, self.pool // 2, count_include_pad=False)


@dataclass(frozen=True)
class AccumulatedAttention(_Sinks):
    """Attention that a token has had from every query since it came: heavy hitters, H2O (2306.14048).

    Old tokens have had more queries than new ones and so lead, as in the paper, whose other half of the budget is the
    newest tokens: here the window. Summing costs as much as attention itself, without a fused kernel.
    """

    queries: ClassVar[int] = 0
    accumulates: ClassVar[bool] = True

    def __call__(self, seen: Seen) -> Tensor:
        if seen.mass_BHT is None:
            raise ValueError("accumulated attention was not collected, and the score reads it")
        return seen.mass_BHT.float()


@dataclass(frozen=True)
class ExpectedAttention(_Sinks):
    """What queries still to come are expected to read of a token, times what it would add: 2510.00636.

    Queries before their rotation are taken as normal with the mean μ and covariance Σ of the newest ones. Turned by
    the mean rotation R̄ of the next `future` positions, E[exp(q·k·s)] = exp(R̄μ·k s + ½ kᵀR̄ΣR̄ᵀk s²); made to sum to one
    over tokens, and multiplied by ‖v‖ (eq. 8 and 9; their ε is 0 here). The paper takes statistics from all hidden
    states of the text; ours are those of the newest queries.

    Args:
        future: positions that the rotation is averaged over.
        queries: of the newest tokens, from which mean and covariance are.
    """

    sinks: int = 4
    future: int = 512
    queries: int = 256
    turns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("future", self.future, 1)
        _at_least("queries", self.queries, 2)

    def __call__(self, seen: Seen) -> Tensor:
        if seen.rotary is None:
            raise ValueError("the rotation of this model's queries is not known, and expected attention undoes it")
        asked = seen.queries_BHGQD.shape[3]
        past_Q = seen.seen - asked + torch.arange(asked, dtype=torch.int64, device=seen.keys_BHTD.device)
        queries_BHGQD = turned(seen.queries_BHGQD.float(), -past_Q, seen.rotary)
        mean_BHG1D = queries_BHGQD.mean(3, keepdim=True)
        spread_BHGQD = (queries_BHGQD - mean_BHG1D) / asked**0.5
        turn_DD = mean_rotation(seen.rotary, seen.seen, self.future, seen.keys_BHTD)
        keys_BH1TD = seen.keys_BHTD.float().unsqueeze(2) @ turn_DD  # rows k ↦ R̄ᵀk
        weight_BHGT = (keys_BH1TD @ mean_BHG1D.mT).squeeze(-1) * seen.scale
        weight_BHGT = weight_BHGT + (keys_BH1TD @ spread_BHGQD.mT).square().sum(-1) * seen.scale**2 / 2
        weight_BHGT = weight_BHGT.masked_fill((seen.positions_BHT < 0).unsqueeze(2), -torch.inf)
        expected_BHT: Tensor = weight_BHGT.softmax(-1).nan_to_num(0).mean(2)
        return expected_BHT * _norm(seen.values_BHTD)


@dataclass(frozen=True)
class HeadKinds(_Sinks):
    """Each kind of head by its own rule, as HACK (2504.09261) does for next-scale image models; on text it is ours.

    Contextual heads, whose queries agree on what they read, keep what attention has fallen on. Structural ones, whose
    reading moves along with the query, keep sinks and, of the rest, half by attention and half the newest: the paper
    keeps the first two scales and the newest one, which a text has not.

    Args:
        queries: of the newest tokens; the paper samples 32.
        share: of a layer's heads that are contextual.
        kinds: of the heads of the blocks that a rule is about, where they were measured: `csc`; else as they are read.
    """

    sinks: int = 4
    queries: int = 32
    share: float = SHARE
    kinds: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("queries", self.queries, 2)
        check_kinds(self.kinds)

    def __call__(self, seen: Seen) -> Tensor:
        p_BHGQT = probabilities(seen)
        kinds_BH = named_BH(self.kinds, p_BHGQT) if self.kinds else contextual_BH(p_BHGQT, self.share)
        mean_BHT = p_BHGQT.mean((2, 3))
        newest_BHT = seen.positions_BHT.float()
        both_BHT = torch.maximum(_rank(mean_BHT), _rank(newest_BHT))
        return torch.where(kinds_BH.unsqueeze(-1), _rank(mean_BHT), both_BHT)


def _norm(x_BHTD: Tensor) -> Tensor:
    return x_BHTD.float().square().sum(-1).sqrt()


def _rank(score_BHT: Tensor) -> Tensor:
    """0 for the lowest of a head, 1 for the highest."""
    return torch.argsort(score_BHT, dim=-1, stable=True).argsort(-1).float() / max(1, score_BHT.shape[-1] - 1)


def turned(x_QD: Tensor, positions_Q: Tensor, rotary: Rotary) -> Tensor:
    """(..., Q, D) turned by each one's position; a negative one turns back."""
    pairs = len(rotary.radians)
    radians_P = torch.tensor(rotary.radians, dtype=torch.float64, device=x_QD.device)
    angle_QP = positions_Q.double()[:, None] * radians_P
    cos_QP, sin_QP = angle_QP.cos().to(x_QD.dtype), angle_QP.sin().to(x_QD.dtype)
    first, second = pair_slices(pairs, rotary.halves)
    out = x_QD.clone()
    a, b = x_QD[..., first], x_QD[..., second]
    out[..., first], out[..., second] = a * cos_QP - b * sin_QP, b * cos_QP + a * sin_QP
    return out


def mean_rotation(rotary: Rotary, start: int, count: int, like: Tensor) -> Tensor:
    """R̄_DD, float32: the mean over positions start to start + count - 1 of the matrix that turns a column, R q."""
    size, pairs = like.shape[-1], len(rotary.radians)
    radians_P = torch.tensor(rotary.radians, dtype=torch.float64, device=like.device)
    angle_FP = torch.arange(start, start + count, dtype=torch.float64, device=like.device)[:, None] * radians_P
    cos_P, sin_P = angle_FP.cos().mean(0), angle_FP.sin().mean(0)
    turn_DD = torch.eye(size, dtype=torch.float64, device=like.device)
    at = torch.arange(size, dtype=torch.int64, device=like.device)
    first, second = (at[part] for part in pair_slices(pairs, rotary.halves))
    turn_DD[first, first], turn_DD[second, second] = cos_P, cos_P
    turn_DD[first, second], turn_DD[second, first] = -sin_P, sin_P
    return turn_DD.float()


def _at_least(name: str, number: int, least: int) -> None:
    if number < least:
        raise ValueError(f"{name} is {least} or more; you wrote {number}")
