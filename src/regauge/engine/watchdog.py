"""What a run needs to know about itself: memory, time, progress; and what it must leave as it found it.

Memory is anonymous resident bytes: pages of mapped weight files can be dropped by the kernel at any time and do not
count. A thread reads it every few milliseconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType

import torch

from regauge.errors import BudgetError
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.runtime.device import on_the_cpu


class PeakMemory:
    """The most anonymous memory seen while the block ran, read every `interval` seconds."""

    def __init__(self, interval: float = 0.01) -> None:
        self.interval = interval
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="regauge-memory")

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            if self._stop.wait(self.interval):
                return

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


@dataclass(frozen=True)
class Progress:
    """One event for whoever watches.

    Attributes:
        phase: `open`, `text`, `search`, `blocks`, `certify`, `finish`.
        done, total: units finished and in all (blocks; 0 of 0 where a phase has none).
        eta: seconds until the end of the phase, or None while unknown.
        message: a sentence for a person, often empty.
        share: how much of the whole command is done, 0 to 1; it never falls. None where nobody laid out a course.
        left: seconds until the command ends, or None while unknown.
    """

    phase: str
    done: int = 0
    total: int = 0
    eta: float | None = None
    message: str = ""
    share: float | None = None
    left: float | None = None


Watcher = Callable[[Progress], None]


def nobody(event: Progress) -> None:
    """Watches nothing."""


SURE = 0.03  # share of a course from which its pace says when it ends


@dataclass(eq=False)
class Course:
    """What a command goes through, in order, and how long each phase is expected to take.

    Attributes:
        expected: phase → what it takes, all in one unit; only their ratios matter.
    """

    expected: Mapping[str, float]
    began: float = field(default_factory=time.monotonic)
    share: float = 0.0
    skipped: float = 0.0  # what an earlier run had done: the pace is that of this one

    def at(self, phase: str, part: float) -> tuple[float, float | None]:
        """(share done, seconds left) where this part of a phase is; an unknown phase changes nothing."""
        whole, before = sum(self.expected.values()), 0.0
        for name, takes in self.expected.items():
            if name == phase:
                self.share = min(1.0, max(self.share, (before + takes * min(1.0, part)) / max(whole, 1e-9)))
                break
            before += takes
        walked = self.share - self.skipped
        if walked < SURE:
            return self.share, None
        return self.share, (time.monotonic() - self.began) * (1 - self.share) / walked


@dataclass(eq=False)
class Clock:
    """Counts finished units, tells the watcher, and keeps the time limit.

    Attributes:
        limit: seconds from the start of the run, or None.
        course: what lies ahead, once that is known.
    """

    watcher: Watcher = nobody
    limit: float | None = None
    began: float = field(default_factory=time.monotonic)
    course: Course | None = None
    _phases: dict[str, tuple[float, int]] = field(default_factory=dict)  # phase → when it began, and from which unit

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def ahead(self, expected: Mapping[str, float]) -> None:
        """Lays out the course: phases in order, and what each is expected to take."""
        self.course = Course(expected)

    def say(self, phase: str, message: str = "") -> None:
        self._tell(Progress(phase, message=message))

    def show(self, phase: str, done: int, total: int) -> None:
        """Progress of a phase that no limit stops in the middle."""
        self._tell(Progress(phase, done, total))

    def ended(self, phase: str) -> None:
        """A phase that counts no units is over."""
        self._tell(Progress(phase, 1, 1))

    def within(self, phase: str) -> Watcher:
        """A watcher for work that is one phase of this clock's course."""

        def tell(event: Progress) -> None:
            share, left = self._at(phase, event.share or 0.0)
            self.watcher(replace(event, share=share, left=left))

        return tell

    def _tell(self, event: Progress) -> None:
        share, left = self._at(event.phase, event.done / event.total if event.total else 0.0)
        self.watcher(replace(event, share=share, left=left))

    def _at(self, phase: str, part: float) -> tuple[float | None, float | None]:
        return (None, None) if self.course is None else self.course.at(phase, part)

    def start(self, phase: str, total: int, done: int = 0) -> None:
        """Begins a phase in which `done` units were finished by an earlier run; phases may lie in each other."""
        self._phases[phase] = time.monotonic(), done
        self._tell(Progress(phase, done, total))
        if done and self.course is not None:
            self.course.skipped = self.course.share

    def tick(self, phase: str, done: int, total: int) -> None:
        """One more unit is finished.

        Raises:
            BudgetError: what is left cannot be done within the limit; what is finished stays for the next run.
        """
        began, first = self._phases[phase]
        each = (time.monotonic() - began) / max(done - first, 1)
        left = each * (total - done)
        self._tell(Progress(phase, done, total, left))
        if self.limit is not None and done < total and self.seconds + left > self.limit:
            raise BudgetError(
                f"the time limit of {self.limit:.0f} s does not suffice: {done} of {total} {phase} are finished after "
                f"{self.seconds:.0f} s and about {left:.0f} s are left; run the same command again to go on, "
                "or give more time."
            )


@contextlib.contextmanager
def quiet_torch(threads: int | None = None) -> Iterator[None]:
    """No gradients, and tensors on the CPU whatever the default device; the caller's random state and thread count are
    as before when the block ends.

    Args:
        threads: how many threads to use inside.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng(), torch.no_grad(), on_the_cpu():
        try:
            if threads is not None and threads != before:
                torch.set_num_threads(threads)
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)
