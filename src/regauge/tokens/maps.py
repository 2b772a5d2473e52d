"""Tokens of a map that a block passes by: which, how many at which scale, and what it adds at their places.

Legend: B batch, L tokens of a scale's map, K kept of them, E those of an earlier scale's map, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Detail:
    """Squared distance from the mean of the map: where there is detail, later scales have something to add (FastVAR,
    arXiv 2503.23367). Higher = kept."""

    def __call__(self, x_BLC: Tensor) -> Tensor:
        return (x_BLC - x_BLC.mean(1, keepdim=True)).square().sum(-1)


@dataclass(frozen=True)
class Lattice:
    """Evenly over the map, whatever it shows: what any other score must beat. Higher = kept."""

    def __call__(self, x_BLC: Tensor) -> Tensor:
        steps_L = torch.arange(x_BLC.shape[1], dtype=torch.float64, device=x_BLC.device) * ((math.sqrt(5) - 1) / 2)
        return (steps_L % 1).expand(len(x_BLC), -1)  # the first of any number lie evenly


@dataclass(frozen=True)
class Late:
    """The same share on the last scales, all tokens on the others.

    The paper's share falls from scale to scale and blocks in front keep all; a rule says that by its selector.

    Args:
        keep: the share of a map's tokens that a block reads, above 0 and at most 1.
        scales: so many of the last.
    """

    keep: float = 0.5
    scales: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is the share of a map that a block reads, above 0 and at most 1, not {self.keep:g}")
        if self.scales < 1:
            raise ValueError(f"scales counts the last ones, 1 or more, not {self.scales}")

    def __call__(self, tokens: int, scale: int, scales: int) -> int:
        """How many of so many tokens stay at a scale, counted from 0."""
        return tokens if scale < scales - self.scales else max(1, round(self.keep * tokens))


@dataclass(frozen=True)
class EarlierScale:
    """What the block added at the last scale that it read whole, at the same place (FastVAR, arXiv 2503.23367)."""

    def __call__(self, earlier_BEC: Tensor, tokens: int) -> Tensor:
        """(B, L, C) to stand where tokens were passed by."""
        sides = math.isqrt(earlier_BEC.shape[1]), math.isqrt(tokens)
        map_BChw = earlier_BEC.transpose(1, 2).reshape(len(earlier_BEC), -1, sides[0], sides[0])
        return functional.interpolate(map_BChw, size=(sides[1], sides[1]), mode="area").flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Nothing:
    """The block adds nothing to them."""

    def __call__(self, earlier_BEC: Tensor, tokens: int) -> Tensor:
        """(B, L, C) to stand where tokens were passed by."""
        batch, _, channels = earlier_BEC.shape
        return earlier_BEC.new_zeros(batch, tokens, channels)


@dataclass(frozen=True)
class Passing:
    """What one block passes by.

    Attributes:
        score: (B, L, C) → (B, L), higher = kept.
        schedule: (tokens, scale, scales) → how many stay.
        disposal: what it added at an earlier scale, and tokens → what it adds where they are passed by.
    """

    score: Callable[[Tensor], Tensor] = Detail()
    schedule: Callable[[int, int, int], int] = Late()
    disposal: Callable[[Tensor, int], Tensor] = EarlierScale()


class Passed:
    """What the blocks pass by while images are drawn, and what must be remembered for it.

    Args:
        rules: of each block; None: it reads every token.
        scales: how many there are.
    """

    def __init__(self, rules: tuple[Passing | None, ...], scales: int) -> None:
        self.rules, self.scales, self._now = rules, scales, 0
        self._earlier: dict[tuple[int, str], Tensor] = {}

    def begin(self, scale: int) -> None:
        """The next scale."""
        self._now = scale

    def run(self, block: int, branch: str, x_BLC: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What a branch of a block adds, computed of the tokens that it does not pass by."""
        rule, tokens = self.rules[block], x_BLC.shape[1]
        if rule is None:
            return compute(x_BLC)
        kept, earlier = rule.schedule(tokens, self._now, self.scales), self._earlier.get((block, branch))
        if kept >= tokens or earlier is None:
            made = compute(x_BLC)
            self._earlier[block, branch] = made
            return made
        index_BKC = rule.score(x_BLC).topk(kept, sorted=False).indices.unsqueeze(-1).expand(-1, -1, x_BLC.shape[-1])
        made = compute(x_BLC.gather(1, index_BKC))
        return rule.disposal(earlier, tokens).scatter(1, index_BKC, made)

    @property
    def bytes(self) -> int:
        """Of what is remembered."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._earlier.values())


def plain(block: int, branch: str, x_BLC: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What a branch adds where nothing is passed by."""
    return compute(x_BLC)
