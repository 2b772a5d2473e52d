"""Budgets: how many older tokens each head keeps. All in whole blocks, and what heads and layers keep adds up.

A budget counts every token that a head holds, the window too: `keep` is a share of the text, up to 1, or above 1 so
many tokens. It is what the mean head of the mean layer keeps at most, which the blocks round down.

Legend: B sequences, H KV heads, O older tokens (all but the window), N blocks of them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from regauge.cache.base import Layer, Seen, probabilities
from regauge.cache.kinds import SHARE, contextual_BH
from regauge.errors import BudgetError

KEPT = 1e6
"""What a protected token is worth, in tokens that are not."""


@dataclass(frozen=True)
class _Kept:
    """The option that budgets share.

    Args:
        keep: the share of the text that stays, above 0 and at most 1; above 1: so many tokens a head.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not self.keep > 0 or (self.keep > 1 and self.keep != int(self.keep)):
            raise ValueError(
                f"keep is the share of the text that stays, above 0 and at most 1, or a whole number of tokens; "
                f"you wrote {self.keep:g}"
            )

    def least(self, seen: int) -> int:
        """Tokens, window and all, that the mean head may keep of so many seen."""
        return int(self.keep) if self.keep > 1 else int(self.keep * seen)

    def blocks(self, seen: Seen, layer: Layer) -> list[tuple[int, tuple[int, ...]]]:
        """Of each sequence: blocks that the mean head keeps of the older tokens, and blocks that each head has."""
        found = []
        for text, real_H in zip(seen.texts, seen.real_BH.tolist(), strict=True):
            there = tuple(-(-real // layer.block) for real in real_H)
            most = max(there)
            found.append((min(max((self.least(text) - seen.window) // layer.block, min(most, 1)), most), there))
        return found


@dataclass(frozen=True)
class Uniform(_Kept):
    """The same in every head of every layer: what every other budget must beat."""

    queries: ClassVar[int] = 0

    def __call__(self, score_BHO: Tensor, seen: Seen, layer: Layer) -> Tensor:
        rows = [[min(mean, each) for each in there] for mean, there in self.blocks(seen, layer)]
        return _lengths(rows, score_BHO, layer)


@dataclass(frozen=True)
class Tokens(Uniform):
    """So many tokens a head, whatever the length of the text: a bare number in a recipe."""

    keep: float = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep <= 1:
            raise ValueError(f"a budget in tokens is a whole number above 1; you wrote {self.keep:g}")


@dataclass(frozen=True)
class Pyramid(_Kept):
    """Much in the first layer and evenly less upwards: PyramidKV (2406.02069, eq. 5 and 6).

    Args:
        beta: the last layer keeps 1/beta of the mean, the first twice the mean less that. The paper's is 20.
    """

    beta: float = 20
    queries: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta is 1 or more; you wrote {self.beta:g}")

    def __call__(self, score_BHO: Tensor, seen: Seen, layer: Layer) -> Tensor:
        steps = max(1, layer.layers - 1)
        weights = tuple(
            (2 - 1 / self.beta) * (1 - number / steps) + number / steps / self.beta for number in range(layer.layers)
        )
        rows = []
        for mean, there in self.blocks(seen, layer):
            most = max(there)
            each = apportion(weights, mean * layer.layers, min(1, most), (most,) * layer.layers)
            rows.append([min(each[layer.number], one) for one in there])
        return _lengths(rows, score_BHO, layer)


@dataclass(frozen=True)
class AcrossHeads(_Kept):
    """The heads of a layer share one budget, and the best blocks of all of them stay: AdaKV (2407.11550).

    A head's best tokens make its first block, the next best its second; blocks are taken in the order of what they sum
    to, so that what stays of the score is the most that whole blocks admit. Wants a score that heads have in common,
    such as attention.

    Args:
        floor: the share of an even budget that every head has for certain; the paper's is 0.2.
    """

    floor: float = 0.2
    queries: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a share, 0 to 1; you wrote {self.floor:g}")

    def __call__(self, score_BHO: Tensor, seen: Seen, layer: Layer) -> Tensor:
        gain_BHN = _gains(score_BHO, seen, layer.block)
        heads, rows = score_BHO.shape[1], []
        for gain_HN, (mean, there) in zip(gain_BHN, self.blocks(seen, layer), strict=True):
            least = max(int(self.floor * mean), min(1, mean))
            sure, most = [min(least, one) for one in there], max(there)
            total = min(mean * heads, sum(there)) - sum(sure)
            number_N = torch.arange(least, max(most, least), dtype=torch.int64, device="cpu")
            is_HN = number_N < torch.tensor(there, dtype=torch.int64, device="cpu")[:, None]
            rest_HN = gain_HN[:, least : max(most, least)].cpu().masked_fill(~is_HN, -torch.inf)
            order = rest_HN.flatten().argsort(descending=True, stable=True)[:total]
            more = (order // max(1, most - least)).bincount(minlength=heads).tolist()
            rows.append([one + another for one, another in zip(sure, more, strict=True)])
        return _lengths(rows, score_BHO, layer)


@dataclass(frozen=True)
class ByKind(_Kept):
    """Little for contextual heads and so more for structural ones: HACK (2504.09261), B = a·B_C + (1 - a)·B_S.

    Heads are told apart by the newest queries while it runs, where the paper does so beforehand (`kinds.py`).

    Args:
        contextual: B_C / B, the share of an even budget that a contextual head keeps.
        queries: of the newest tokens, by which heads are told apart.
        share: a, the share of a layer's heads that are contextual.
    """

    contextual: float = 0.75
    queries: int = 32
    share: float = SHARE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is a share of the heads, 0 to 1; you wrote {self.share:g}")
        if not 0 < self.contextual <= 1:
            raise ValueError(
                f"contextual is a share of an even budget, above 0 and at most 1; {self.contextual:g} is not"
            )

    def __call__(self, score_BHO: Tensor, seen: Seen, layer: Layer) -> Tensor:
        kinds, rows = contextual_BH(probabilities(seen), self.share).tolist(), []
        for kind, (mean, there) in zip(kinds, self.blocks(seen, layer), strict=True):
            share = sum(kind) / len(kind)
            structural = (1 - share * self.contextual) / (1 - share) if share < 1 else 1.0
            weights = tuple(self.contextual if one and share < 1 else structural for one in kind)
            rows.append(apportion(weights, min(mean * len(kind), sum(there)), min(1, mean), there))
        return _lengths(rows, score_BHO, layer)


@dataclass(frozen=True)
class Sensitivity(_Kept):
    """In proportion to how much each block, or each head of it, has been measured to matter; by whom is open.

    Args:
        weights: a number a block, blanks between them; or one a KV head, with strokes: `3/1 1/1` of two blocks.
    """

    weights: str = ""
    queries: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            found = [weight for row in self.rows for weight in row]
        except ValueError as error:
            said = f"weights are numbers, one a block, such as '3 1 1 2'; you wrote {self.weights!r}"
            raise ValueError(said) from error
        if not all(0 <= weight < math.inf for weight in found):
            raise ValueError(f"weights are 0 or more, and finite; you wrote {self.weights!r}")

    @property
    def rows(self) -> tuple[tuple[float, ...], ...]:
        """Of each block one number, or one a KV head."""
        return tuple(tuple(float(each) for each in row.split("/")) for row in self.weights.split())

    def __call__(self, score_BHO: Tensor, seen: Seen, layer: Layer) -> Tensor:
        heads, rows, given = score_BHO.shape[1], [], self.rows
        if len(given) != layer.layers or any(len(row) not in (1, heads) for row in given):
            raise BudgetError(
                f"a budget by sensitivity wants a weight for each of {layer.layers} blocks, or for each of their "
                f"{heads} heads, and {self.weights!r} has {len(given)}"
            )
        weights = tuple(weight for row in given for weight in (row * heads if len(row) == 1 else row))
        for mean, there in self.blocks(seen, layer):
            each = apportion(weights, mean * len(weights), min(1, mean), there * layer.layers)
            rows.append(each[layer.number * heads : (layer.number + 1) * heads])
        return _lengths(rows, score_BHO, layer)


@lru_cache(maxsize=256)
def apportion(weights: tuple[float, ...], total: int, least: int, most: tuple[int, ...]) -> tuple[int, ...]:
    """`total` blocks in proportion to weights, by the method of Webster (rounding to the nearest at one divisor).

    Each has `least` and at most its own `most`; the sum is `total` wherever those bounds admit it.
    """
    shares = [min(least, bound) for bound in most]
    heap = [
        (-weight / (2 * share + 1), number) for number, (weight, share) in enumerate(zip(weights, shares, strict=True))
    ]
    heapq.heapify(heap)
    left = total - sum(shares)
    while left > 0 and heap:
        _, number = heapq.heappop(heap)
        if shares[number] == most[number]:
            continue
        shares[number] += 1
        left -= 1
        heapq.heappush(heap, (-weights[number] / (2 * shares[number] + 1), number))
    return tuple(shares)


def _gains(score_BHO: Tensor, seen: Seen, block: int) -> Tensor:
    """(B, H, N): what each head's best block of tokens sums to, then its second best, and so on."""
    real_BHO = (seen.positions_BHT[:, :, : seen.older] >= 0) & score_BHO.isfinite()
    least = torch.where(real_BHO, score_BHO, torch.inf).amin().nan_to_num(posinf=0)
    finite_BHO = torch.where(real_BHO, score_BHO, torch.where(score_BHO.isposinf(), KEPT, least))
    pad = -score_BHO.shape[-1] % block
    sorted_BHO = torch.nn.functional.pad(finite_BHO.sort(-1, descending=True).values, (0, pad))
    return sorted_BHO.reshape(*sorted_BHO.shape[:2], -1, block).double().sum(-1)


def _lengths(rows: Sequence[Sequence[int]], like: Tensor, layer: Layer) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device) * layer.block
