"""A length of time as a promise: what has been spent, what must still come, and what may be spent besides.

What must come (the artifact, its figures) is counted before, at the machine's own rates, and corrected by how much
longer or shorter the steps so far took than they were expected to: a machine may become busy on the way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from regauge.engine.watchdog import Clock
from regauge.kernels.cpu.machine import give_back

PRIOR = 2.0  # seconds of steps that took what was expected, with which the pace begins
SLOWEST, FASTEST = 8.0, 0.8
LAST = 0.5  # seconds for the record and the page


@dataclass(eq=False)
class Stopwatch:
    """Seconds by step, in the order in which they began.

    Attributes:
        limit: seconds, or None.
        expected: step → seconds, as counted before.
        must: the same of what is done in any case, in its least form.
        left_out: what was not done for want of time, in words.
    """

    limit: float | None = None
    clock: Clock = field(default_factory=Clock)  # is told of every step
    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    expected: dict[str, float] = field(default_factory=dict)
    must: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts what is done inside to one step; a step may come back."""
        since = time.monotonic()
        self.clock.say(name)
        yield
        give_back()  # what a step freed would otherwise stand beside what the next takes
        self.clock.ended(name)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - since, 2)
        self.must.pop(name, None)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def expects(self, steps: Mapping[str, float], must: Mapping[str, float]) -> None:
        """What the steps are expected to take, and what is done in any case."""
        self.expected, self.must = dict(steps), dict(must)

    @property
    def pace(self) -> float:
        """How many times what was expected the steps so far took."""
        known = [name for name in ("sensitivity", "rounding", "trials", "build") if name in self.seconds]
        spent = PRIOR + sum(self.seconds[name] for name in known)
        told = PRIOR + sum(self.expected.get(name, 0.0) for name in known)
        return min(SLOWEST, max(FASTEST, spent / told))

    def spare(self) -> float:
        """Seconds that may be spent on what need not be; without a limit there is no end to them."""
        if self.limit is None:
            return math.inf
        return self.limit - self.elapsed - LAST - self.pace * sum(self.must.values())

    def can(self, what: str, seconds: float) -> bool:
        """Whether there is time for something that is expected to take so long; where not, it is noted as left out."""
        if self.pace * seconds <= self.spare():
            return True
        self._leave(what)
        return False

    def many(self, what: str, wanted: int, each: float) -> int:
        """How many of some things that take so long each there is time for."""
        spare = self.spare()
        count = wanted if math.isinf(spare) else int(min(wanted, max(0.0, spare) / max(self.pace * each, 1e-9)))
        if count < wanted:
            self._leave(f"{wanted - count} of {wanted} {what}")
        return count

    def _leave(self, what: str) -> None:
        if what not in self.left_out:
            self.left_out.append(what)

    @property
    def late(self) -> tuple[str, ...]:
        """What there was no time for, and where the time did not suffice for the least; nothing without a limit."""
        if self.limit is None:
            return ()
        notes = []
        if self.left_out:
            notes.append(
                f"left out so as to end within --time {self.limit:g}s: {', '.join(self.left_out)}; the same command "
                "with more time and --force goes on from what was found"
            )
        if self.elapsed > self.limit:
            notes.append(
                f"--time asked for {self.limit:g} s and the search took {self.elapsed:.0f} s: the machine slowed"
            )
        return tuple(notes)
