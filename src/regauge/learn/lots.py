"""What samplers draw, and by what lots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from regauge.elastic.subnet import Subnet
from regauge.learn.space import Choice, Space


@dataclass(frozen=True)
class Drawn:
    """A member that a step trains, and the weight of its loss."""

    subnet: Subnet
    weight: float = 1.0


def ordered(space: Space, drawn: Sequence[Drawn]) -> tuple[Drawn, ...]:
    """Members, the largest first."""
    return tuple(sorted(drawn, key=lambda one: -space.size(one.subnet)))


def without_full(space: Space, chance: random.Random) -> Subnet:
    """A member by lot that is not the whole, if there is one."""
    for _ in range(64):
        found = space.random(chance)
        if not found.full:
            return found
    return space.smallest


def leaning(some: Sequence[Choice], level: float, chance: random.Random) -> Choice:
    """A choice whose place in the list is `level` on average."""
    place = level * (len(some) - 1)
    low = int(place)
    return some[min(low + (chance.random() < place - low), len(some) - 1)]
