"""What a run needs to know about itself: memory, time, progress; and what it must leave as it found it.

Memory is anonymous resident bytes: pages of mapped weight files can be dropped by the kernel at any time and do not
count. A thread reads it every few milliseconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    """

    phase: str
    done: int = 0
    total: int = 0
    eta: float | None = None
    message: str = ""


Watcher = Callable[[Progress], None]


def nobody(event: Progress) -> None:
    """Watches nothing."""


@dataclass(eq=False)
class Clock:
    """Counts finished units, tells the watcher, and keeps the time limit.

    Attributes:
        limit: seconds from the start of the run, or None.
    """

    watcher: Watcher = nobody
    limit: float | None = None
    began: float = field(default_factory=time.monotonic)
    _phases: dict[str, tuple[float, int]] = field(default_factory=dict)  # phase → when it began, and from which unit

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def say(self, phase: str, message: str = "") -> None:
        self.watcher(Progress(phase, message=message))

    def show(self, phase: str, done: int, total: int) -> None:
        """Progress of a phase that no limit stops in the middle."""
        self.watcher(Progress(phase, done, total))

    def start(self, phase: str, total: int, done: int = 0) -> None:
        """Begins a phase in which `done` units were finished by an earlier run; phases may lie in each other."""
        self._phases[phase] = time.monotonic(), done
        self.watcher(Progress(phase, done, total))

    def tick(self, phase: str, done: int, total: int) -> None:
        """One more unit is finished.

        Raises:
            BudgetError: what is left cannot be done within the limit; what is finished stays for the next run.
        """
        began, first = self._phases[phase]
        each = (time.monotonic() - began) / max(done - first, 1)
        left = each * (total - done)
        self.watcher(Progress(phase, done, total, left))
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
