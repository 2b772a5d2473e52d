"""What a family's training draws from: choices with their sizes, and the turn of a step. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regauge.elastic.subnet import Subnet

PER_BLOCK = ("bits", "ffn", "heads", "kernel")
"""Dimensions of which each block may have a value of its own."""


@dataclass(frozen=True)
class Choice:
    """One value of a dimension and its share of the whole; `None` is the whole, which as one of several is `whole`."""

    value: Any
    share: float
    whole: Any = 1.0


WHOLE = Choice(None, 1.0)


@dataclass(frozen=True)
class Space:
    """What there is to choose from.

    Attributes:
        choices: dimension → its choices, the largest first (the whole, where it can be drawn), the smallest last.
        blocks: of the whole.
        each: whether each block of a member has a width of its own.
        named: members that the family calls by a name, and about which share of the whole's products each has.
    """

    choices: Mapping[str, tuple[Choice, ...]]
    blocks: int
    each: bool = False
    named: Mapping[Subnet, float] = field(default_factory=dict)

    def member(self, picked: Mapping[str, Choice | Sequence[Choice]]) -> Subnet:
        """The member of some choices; a dimension that is not named is whole."""
        found: dict[str, Any] = {}
        for name, one in picked.items():
            if isinstance(one, Choice):
                found[name] = one.value
            elif any(choice.value is not None for choice in one):
                found[name] = tuple(self.said(name, choice) for choice in one)
        return Subnet(**found)

    def said(self, name: str, choice: Choice) -> Any:
        """A choice as one of several says it, where the whole has to be said too."""
        return choice.whole if choice.value is None else choice.value

    @property
    def smallest(self) -> Subnet:
        return self.member({name: some[-1] for name, some in self.choices.items()})

    def random(self, chance: random.Random, dims: Mapping[str, Sequence[Choice]] | None = None) -> Subnet:
        """A member by lot, of the choices given or of all."""
        dims = self.choices if dims is None else dims
        picked: dict[str, Choice | Sequence[Choice]] = {name: chance.choice(list(some)) for name, some in dims.items()}
        if self.each:
            for name in PER_BLOCK:
                if name in dims:
                    picked[name] = [chance.choice(list(dims[name])) for _ in range(self.depth(picked))]
        return self.member(picked)

    def depth(self, picked: Mapping[str, Choice | Sequence[Choice]]) -> int:
        """Blocks of a member."""
        one = picked.get("depth", WHOLE)
        assert isinstance(one, Choice), "depth is one number"
        return max(1, round(one.share * self.blocks))

    def size(self, subnet: Subnet) -> float:
        """About which share of the whole's products a member has: the product of its shares, a mean over blocks."""
        if subnet in self.named:
            return self.named[subnet]
        size = 1.0
        for name, some in self.choices.items():
            value = getattr(subnet, name)
            shares = {choice.value: choice.share for choice in some} | {some[0].whole: 1.0}
            values = value if isinstance(value, tuple) else (value,)
            size *= sum(shares[one] for one in values) / len(values)
        return size


@dataclass(frozen=True)
class Turn:
    """Where a training is: a step of how many, and the seed that every draw follows from."""

    step: int
    steps: int
    seed: int = 0
    batch: int = 0

    @property
    def progress(self) -> float:
        return self.step / self.steps

    @property
    def chance(self) -> random.Random:
        """The lots of this step."""
        return random.Random(f"{self.seed} {self.step}")
