"""Progress on standard error: one bar for the whole command and one for the stage at hand; lines where there is no
terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TextColumn

from regauge.cli.show import remark, span
from regauge.errors import printable

SILENCE = 10.0  # seconds without a line, where there is no terminal, after which one says how far the work is
PATIENCE = 5.0  # seconds of a run without a terminal before its stages are told


@runtime_checkable
class Event(Protocol):
    """What long work says as it goes (`engine.watchdog.Progress`)."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def message(self) -> str: ...
    @property
    def share(self) -> float | None: ...
    @property
    def left(self) -> float | None: ...


@contextmanager
def progress(command: str = "", quiet: bool = False, verbose: bool = False) -> Iterator[Callable[[Event], None]]:
    """Shows events while the block runs.

    Args:
        command: stands before the bar of the whole.
        quiet: nothing is shown, errors apart.
        verbose: every stage leaves a line with its time.
    """
    if quiet:
        yield lambda event: None
        return
    stages = Stages(remark if verbose else None)
    if sys.stderr.isatty():
        with _bars(command) as tell:
            yield stages.then(tell)
    else:
        with _lines(command) as tell:
            yield stages.then(tell)
    stages.end()


@contextmanager
def working(
    command: str, quiet: bool = False, verbose: bool = False, threads: int | None = None
) -> Iterator[Callable[[Event], None]]:
    """`progress`, with so many threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    with progress(command, quiet, verbose) as watch:
        yield watch


class Stages:
    """Tells how long each stage took, where somebody wants to know."""

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self.say, self.phase, self.began = say, "", time.monotonic()

    def then(self, tell: Callable[[Event], None]) -> Callable[[Event], None]:
        def both(event: Event) -> None:
            if event.phase != self.phase:
                self.end()
                self.phase, self.began = event.phase, time.monotonic()
            tell(event)

        return both

    def end(self) -> None:
        if self.say is not None and self.phase:
            self.say(f"{self.phase}: {span(time.monotonic() - self.began)}")
        self.phase = ""


@contextmanager
def _lines(command: str) -> Iterator[Callable[[Event], None]]:
    """Messages as they come; in long runs each stage, and every ten seconds of silence how far the work is."""
    began, state, lock = time.monotonic(), _State(), threading.Lock()
    stop = threading.Event()

    def told(event: Event) -> None:
        with lock:
            state.event = event
            if event.message:
                state.say(f"{event.phase}: {event.message}")
            elif event.total > 1 and event.phase not in state.seen and time.monotonic() - began > PATIENCE:
                state.seen.add(event.phase)
                state.say(f"{event.phase}: {event.total} to do")

    def watch() -> None:
        while not stop.wait(1.0):
            with lock:
                if time.monotonic() - state.last >= SILENCE:
                    state.say(f"{command or 'working'}: {_far(state.event, time.monotonic() - began)}")

    thread = threading.Thread(target=watch, daemon=True, name="regauge-progress")
    thread.start()
    try:
        yield told
    finally:
        stop.set()
        thread.join()


class _State:
    """What was said last, and when."""

    def __init__(self) -> None:
        self.event: Event | None = None
        self.last, self.seen = time.monotonic(), set[str]()

    def say(self, text: str) -> None:
        self.last = time.monotonic()
        remark(text)


def _far(event: Event | None, seconds: float) -> str:
    """`43 %, rounding 3 of 6, 31 s so far, about 42 s left`."""
    told = []
    if event is not None:
        told += [] if event.share is None else [f"{100 * event.share:.0f} %"]
        told.append(f"{event.phase} {event.done} of {event.total}" if event.total else event.phase)
    told.append(f"{clock(seconds)} so far")
    if event is not None and event.left is not None:
        told.append(f"about {clock(event.left)} left")
    return ", ".join(told)


def clock(seconds: float) -> str:
    """`0:42`, `3:07`, `1:02:10`."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class _Times(TextColumn):
    """Elapsed, and remaining where it is known."""

    def render(self, task: Task) -> RenderableType:  # type: ignore[override]  # a text, as every column is
        from rich.text import Text

        left = task.fields.get("left")
        return Text(f"{clock(task.elapsed or 0.0)}{'' if left is None else f', about {clock(left)} left'}")


@contextmanager
def _bars(command: str) -> Iterator[Callable[[Event], None]]:
    named, of = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[of]}", markup=False)
    console = Console(stderr=True, highlight=False, markup=False)
    with Progress(named, BarColumn(bar_width=30), of, _Times(""), console=console, transient=True) as bars:
        whole = bars.add_task(command or "working", total=None, of="", left=None)
        stage = bars.add_task("", total=1, visible=False, of="", left=None)
        known = [""]

        def tick(event: Event) -> None:
            if event.message:
                bars.console.print(printable(f"{event.phase}: {event.message}"))
            if event.share is not None:
                bars.update(whole, completed=event.share, total=1.0, of=f"{100 * event.share:3.0f} %", left=event.left)
            if event.phase != known[0]:
                known[0] = event.phase
                bars.reset(stage, total=event.total or None, description=f"  {printable(event.phase)}", of="")
                bars.update(stage, visible=True)
            if event.total:
                bars.update(stage, completed=event.done, total=event.total, of=f"{event.done}/{event.total}")

        yield tick
        bars.update(whole, completed=1.0, total=1.0, of="100 %", left=None)
        bars.update(stage, visible=False)
