"""What drafts would have made of a text that is there already: the loop itself, on a clock that counts what steps cost.

A guess counts as far as it is right, and while guesses are right the text before them is the text. So the likeliest
tokens of a drafting model along a text, which one pass over it gives, say what each of its drafts would have been
worth, of any length; the costs may be those of another machine, or of a larger model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regauge.runtime.drafts.lookup import Lookup
from regauge.runtime.drafts.loop import drafted
from regauge.runtime.drafts.pace import Costs, Pace
from regauge.runtime.drafts.source import Draft
from regauge.runtime.drafts.worth import MOST

WRONG = -1
"""A guess behind a wrong one."""


@dataclass(frozen=True)
class Passage:
    """A text that was written on.

    Attributes:
        ids: all of it.
        begin: tokens that were given.
    """

    ids: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Times:
    """What steps take, in any unit.

    Attributes:
        steps: of 1, 2, … tokens.
        guess: of one guessed token; None: guesses are looked up and cost nothing.
    """

    steps: tuple[float, ...]
    guess: float | None = None


@dataclass(frozen=True)
class Replayed:
    """What became of a passage.

    Attributes:
        tokens: that were written behind the first of them.
        plain: what these take one by one; `taken`: with drafts.
        steps, drafted, accepted: how many there were.
    """

    tokens: int
    plain: float
    taken: float
    steps: int
    drafted: int
    accepted: int


def replayed(passage: Passage, times: Times, likely: Sequence[int] | None = None) -> Replayed:
    """A passage written once more, with drafts.

    Args:
        likely: the drafting model's likeliest token behind each token of the passage; None: prompt look-up drafts.
    """
    clock, ids, begin = _Clock(), passage.ids, passage.begin
    source = Lookup(ids[:begin]) if likely is None else _Likely(passage, likely, times.guess or 0.0, clock)
    costs = Costs(seconds=list(times.steps), guess=times.guess or 0.0, clock=clock)
    first = torch.tensor(ids[begin], dtype=torch.int64, device="cpu")
    target = _Written(passage, times.steps, clock)
    found = list(drafted(target, source, Pace(costs), first, int, len(ids) - begin))
    assert tuple(found) == ids[begin:], "guesses never change a text"
    more = len(found) - 1
    return Replayed(more, more * times.steps[0], clock.now, costs.steps, costs.drafted, costs.accepted)


class _Clock:
    """What was spent so far."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Written:
    """A text as the model that wrote it: the logits of a place are the token behind it."""

    def __init__(self, passage: Passage, steps: Sequence[float], clock: _Clock) -> None:
        self._ids, self._held, self._steps, self._clock = passage.ids, passage.begin, steps, clock

    def step(self, ids: Sequence[int]) -> Tensor:
        self._clock.now += self._steps[len(ids) - 1]
        self._held += len(ids)
        follow = self._ids[self._held - len(ids) + 1 : self._held + 1]
        return torch.tensor(follow, dtype=torch.int64, device="cpu")

    def back(self, tokens: int) -> None:
        self._held -= tokens

    def together(self, most: int) -> int:
        return min(most, MOST + 1)


class _Likely:
    """A drafting model, by its likeliest tokens along the text."""

    free: ClassVar[bool] = False

    def __init__(self, passage: Passage, likely: Sequence[int], guess: float, clock: _Clock) -> None:
        self._ids, self._seen, self._likely, self._guess = passage.ids, passage.begin, likely, guess
        self._clock = clock

    def extend(self, ids: Iterable[int]) -> None:
        self._seen += len(tuple(ids))

    def propose(self, most: int) -> Draft:
        found: list[int] = []
        for place in range(self._seen, self._seen + most):
            right = not found or found[-1] == self._ids[place - 1]
            found.append(self._likely[place - 1] if right else WRONG)
        self._clock.now += most * self._guess
        return Draft(tuple(found))
