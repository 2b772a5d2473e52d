"""Which members of a family one step trains: a sampler is a pure function of the choices and of the turn.

The largest member comes first. Nothing here is a state: what a step draws follows from the seed and its number, so a
run that goes on after a crash, and every process of several, draws the same. Imports no torch.

Legend: D blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

from regauge.elastic.subnet import Subnet
from regauge.errors import nearest
from regauge.learn.lots import Drawn, leaning, ordered, without_full
from regauge.learn.space import PER_BLOCK, WHOLE, Choice, Space, Turn


@runtime_checkable
class Sampler(Protocol):
    """Which members a step trains, the largest first."""

    @property
    def whole(self) -> bool:
        """Whether the whole is among what is trained."""

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]: ...


FULL = Drawn(Subnet())


@dataclass(frozen=True)
class Uniform:
    """Members by lot, each choice of each dimension as likely as another."""

    whole: ClassVar[bool] = True
    count: int = 1

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        chance = turn.chance
        return ordered(space, [Drawn(space.random(chance)) for _ in range(self.count)])


@dataclass(frozen=True)
class Sandwich:
    """The largest, some by lot, the smallest: the ends bound what lies between (arXiv 1903.05134)."""

    whole: ClassVar[bool] = True
    count: int = 2

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        chance = turn.chance
        between = [Drawn(space.random(chance)) for _ in range(self.count)]
        return (FULL, *ordered(space, between), Drawn(space.smallest))


@dataclass(frozen=True)
class Progressive:
    """One dimension after another, each opened choice by choice, those before it staying open (arXiv 1908.09791).

    The first part of the steps trains the largest alone; then every dimension has a part as long, in the family's
    order. `count` members a step, by lot.
    """

    whole: ClassVar[bool] = True
    count: int = 2

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        phases = [(name, upto) for name, some in space.choices.items() for upto in range(2, len(some) + 1)]
        phase = min(int(turn.progress * (len(phases) + 1)), len(phases))
        if not phase:
            return (FULL,)
        opened = dict(phases[:phase])
        dims = {name: some[: opened.get(name, 1)] for name, some in space.choices.items()}
        chance = turn.chance
        return ordered(space, [Drawn(space.random(chance, dims)) for _ in range(self.count)])


@dataclass(frozen=True)
class Shrinking:
    """The largest alone until it is half trained, then a sandwich whose members' weight grows from ε to 1
    (arXiv 2407.06167).

    Attributes:
        start: the share of the steps before any member is drawn; ramp: the share in which its weight grows.
    """

    whole: ClassVar[bool] = True
    count: int = 2
    start: float = 0.5
    ramp: float = 0.25
    epsilon: float = 0.01

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        if turn.progress < self.start:
            return (FULL,)
        weight = min(1.0, self.epsilon + (1 - self.epsilon) * (turn.progress - self.start) / self.ramp)
        drawn = Sandwich(self.count)(space, turn)
        return tuple(one if one.subnet.full else Drawn(one.subnet, weight) for one in drawn)


@dataclass(frozen=True)
class Phases:
    """One member a step, or the largest: how often follows three phases, both together (a member with the chance
    `rare`), a transition, members only (arXiv 2511.16546). `count` is of nothing but 1."""

    whole: ClassVar[bool] = True
    count: int = 1
    rare: float = 0.2
    joint: float = 1 / 6
    transition: float = 1 / 2

    def often(self, progress: float) -> float:
        """The chance of a member."""
        rising = (progress - self.joint) / self.transition
        return self.rare + (1 - self.rare) * min(max(rising, 0.0), 1.0)

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        chance = turn.chance
        if chance.random() >= self.often(turn.progress):
            return (FULL,)
        members = [without_full(space, chance) for _ in range(self.count)]
        return ordered(space, [Drawn(one) for one in members])


@dataclass(frozen=True)
class Balanced:
    """Every size as often as another (arXiv 2405.20202): where each block draws for itself nearly all members are of
    middling size, so a size is drawn first and then a member near it."""

    whole: ClassVar[bool] = True
    count: int = 2

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        chance = turn.chance
        return ordered(space, [Drawn(self._near(space, chance)) for _ in range(self.count)])

    def _near(self, space: Space, chance: random.Random) -> Subnet:
        picked: dict[str, Choice | Sequence[Choice]] = {}
        level = chance.random()
        for name, some in sorted(space.choices.items(), key=lambda one: one[0] != "depth"):  # says how many blocks
            if space.each and name in PER_BLOCK:
                picked[name] = [leaning(some, level, chance) for _ in range(space.depth(picked))]
            else:
                picked[name] = leaning(some, level, chance)
        return space.member(picked)


@dataclass(frozen=True)
class Exits:
    """Every depth each step, weighted by its share of the whole: the deeper the more (arXiv 2503.03008)."""

    whole: ClassVar[bool] = True
    count: int = 1

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        some = space.choices.get("depth", (WHOLE,))
        return tuple(Drawn(space.member({"depth": one}), one.share) for one in some)


@dataclass(frozen=True)
class Growing:
    """One member a step, from the smallest to the whole as the steps go by, each choice for about as long
    (arXiv 2303.01610): k = round((N − k₀) · progress) + k₀ where every number between is a choice."""

    whole: ClassVar[bool] = True
    count: int = 1

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        picked = {
            name: some[len(some) - 1 - round((len(some) - 1) * turn.progress)] for name, some in space.choices.items()
        }
        return (Drawn(space.member(picked)),)


@dataclass(frozen=True)
class Named:
    """The members that the family calls by a name, and the whole: each once before any comes again, in an order by lot.

    Nothing is spent on sizes that nobody asked for. Without names: the whole and the smallest.
    """

    whole: ClassVar[bool] = True
    count: int = 1

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        every = [Subnet(), *(space.named or (space.smallest,))]
        places = range(turn.step * self.count, (turn.step + 1) * self.count)
        return ordered(space, [Drawn(self._round(every, turn, at // len(every))[at % len(every)]) for at in places])

    def _round(self, every: list[Subnet], turn: Turn, number: int) -> list[Subnet]:
        return replace(turn, step=number).chance.sample(every, len(every))


@dataclass(frozen=True)
class Smallest:
    """The smallest member and no other: the null of every family, a model trained alone."""

    whole: ClassVar[bool] = False
    count: int = 1

    def __call__(self, space: Space, turn: Turn) -> tuple[Drawn, ...]:
        return (Drawn(space.smallest),)


SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
    "balanced": Balanced,
    "exits": Exits,
    "growing": Growing,
    "named": Named,
    "phases": Phases,
    "progressive": Progressive,
    "sandwich": Sandwich,
    "shrinking": Shrinking,
    "smallest": Smallest,
    "uniform": Uniform,
}
"""Name in a recipe → sampler; the number behind a colon is how many members a step draws by lot."""


def sampler_of(text: str) -> Sampler:
    """`sandwich:2` → the sampler.

    Raises:
        ValueError: there is none of this name, or the number is none.
    """
    name, colon, number = text.partition(":")
    if name not in SAMPLERS:
        raise ValueError(f"sampler is one of {', '.join(SAMPLERS)}, not {name[:40]!r}{nearest(name, SAMPLERS)}")
    if not colon:
        return SAMPLERS[name]()
    if not number.isdecimal() or not 0 < int(number) <= 64:
        raise ValueError(f"a sampler draws 1 to 64 members a step, not {number[:40]!r}")
    return SAMPLERS[name](int(number))
