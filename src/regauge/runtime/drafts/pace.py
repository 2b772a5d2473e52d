"""How many tokens to draft: as many as promise the most tokens a second, by what was right and by what steps took.

A step that reads n tokens takes c(n) seconds, measured as steps come. Guesses that cost nothing are compared with the
text even where they were not tried, so a text that begins to repeat itself is noticed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from regauge.runtime.drafts.source import Draft
from regauge.runtime.drafts.worth import MOST, best

WORTH = 6.0
"""Observations that what is believed beforehand counts for."""
MEMORY = 64.0
"""Observations after which older ones fade."""
OPTIMISM = 0.04
"""By what share of a step a token more is believed to lengthen it, until that was measured."""
FADE = 0.01
"""How much of what a step took is forgotten with each step of another length: what was measured in a bad moment is
tried again."""
PROBES = 4, 64
"""Steps after which guesses that cost something are tried again where they did not pay: at first, and at the most, for
each time doubles them."""


@dataclass
class Costs:
    """What steps of 1, 2, … tokens take, in seconds, and a guess by a source that is not free. One a model: texts share
    it.

    Attributes:
        seconds: of a step of so many tokens, from 1 on; 0: not measured.
        guess: seconds of one guessed token.
        steps, drafted, accepted: how many there were, for whoever wants to know.
        clock: tells the time, in seconds.
    """

    seconds: list[float] = field(default_factory=lambda: [0.0] * (MOST + 1))
    guess: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False, compare=False)

    def took(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self.steps += 1
        index = min(tokens, MOST + 1) - 1
        before = self.seconds[index]
        # a pause of the machine is no property of the step
        self.seconds[index] = seconds if not before else before + 0.2 * (min(seconds, 3 * before) - before)
        first = self.seconds[0]
        for other, held in enumerate(self.seconds):
            if other not in (0, index) and held and first:
                self.seconds[other] += FADE * (first * (1 + OPTIMISM * other) - held)

    def guessed(self, tokens: int, seconds: float) -> None:
        """So many guesses took so long."""
        each = seconds / tokens
        self.guess = each if not self.guess else self.guess + 0.2 * (min(each, 3 * self.guess) - self.guess)

    def of(self, tokens: int) -> float:
        """Seconds of a step of so many tokens: as measured, or between and beyond what was."""
        at, held = tokens - 1, self.seconds
        if held[at]:
            return held[at]
        below = next(i for i in range(at, -1, -1) if held[i])
        above = next((i for i in range(at, len(held)) if held[i]), None)
        if above is None:
            return held[below] + (at - below) * OPTIMISM * held[0]
        return held[below] + (held[above] - held[below]) * (at - below) / (above - below)


class Rate:
    """How often something is right: a mean that fades, from a belief on."""

    def __init__(self, belief: float) -> None:
        self._right, self._all = belief * WORTH, WORTH

    def seen(self, right: bool) -> None:
        """One more."""
        if self._all > MEMORY:
            self._right, self._all = self._right * MEMORY / self._all, MEMORY
        self._right, self._all = self._right + right, self._all + 1

    @property
    def value(self) -> float:
        return self._right / self._all


class Pace:
    """Of one text.

    Args:
        costs: of the model that checks.
        sure: what is believed of the first guess before any was seen, by `Draft.matched`.
    """

    def __init__(
        self, costs: Costs, sure: tuple[float, ...] = (0.5, 0.15, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
    ) -> None:
        self.costs = costs
        self._first = [Rate(belief) for belief in sure]
        self._further = [Rate(0.5 + belief / 2) for belief in sure]
        self._open: deque[tuple[Draft, int]] = deque(maxlen=MOST)  # guesses, and how many of them came true
        self._idle, self._patience = 0, PROBES[0]

    def length(self, matched: int, most: int, free: bool) -> int:
        """How many of `most` guesses to try."""
        costs = self.costs
        if not costs.seconds[0] or most < 1:
            return 0
        first, further = self._first[matched].value, self._further[matched].value
        found, _ = best(first, further, costs.of, 0.0 if free else costs.guess, most)
        self._idle = 0 if found or free else self._idle + 1
        if self._idle >= self._patience:
            self._idle, self._patience, found = 0, min(2 * self._patience, PROBES[1]), min(2, most)
        return found

    def tried(self, draft: Draft) -> None:
        """These are guesses for the tokens that come now, whether they are tried or not."""
        if draft.tokens:
            self._open.append((draft, 0))

    def came(self, token: int) -> None:
        """A token of the text."""
        for _ in range(len(self._open)):
            draft, true = self._open.popleft()
            right = draft.tokens[true] == token
            (self._further if true else self._first)[draft.matched].seen(right)
            if right and true + 1 < len(draft.tokens):
                self._open.append((draft, true + 1))
