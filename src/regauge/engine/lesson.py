"""What every process of a training is told, and what it makes of that: the family over which members lie."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from regauge.elastic.legal import settled
from regauge.engine.pieces import LEARNT, Pieces
from regauge.engine.raised import rounded, stored
from regauge.engine.raising import Batch, Raising
from regauge.engine.recovery_text import LOOKS
from regauge.hosts import host_of
from regauge.hosts.teaching import Beside, Trainee
from regauge.learn.loop import At, State
from regauge.learn.ranks import Ranks
from regauge.learn.settings import Settings
from regauge.learn.training import SHARED, Training
from regauge.runtime.rows import CPU

HALF = torch.float16
"""In what adapters are stored: small numbers, of which none is much smaller than another."""
TIMED = 3
"""Steps that are timed, since members differ in size."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What every process is told.

    Attributes:
        base: the family, without training; source: the model that it was made of.
        text, aside: batches to train on, and held out.
        state: where to go on from.
        device: where members run.
        timed: whether steps are timed before it is said how many there are.
        kept: name of the pieces of a state to go on from, of which each process has its own; "": none.
    """

    base: Path
    source: Path
    training: Training
    steps: int
    every: int
    text: tuple[Batch, ...]
    aside: tuple[Batch, ...]
    seed: int
    state: State | None
    device: str
    timed: bool = False
    kept: str = ""

    @property
    def settings(self) -> Settings:
        """What the loop is told."""
        return self.training.settings(self.steps, self.every)

    def of(self, steps: int) -> Lesson:
        """The same in so many steps."""
        return replace(self, steps=steps, every=math.ceil(steps / LOOKS))

    @property
    def folder(self) -> Path:
        """Where states are kept, beside the family."""
        return self.base.parent


def trainee_of(lesson: Lesson, group: Ranks) -> Trainee:
    """The family as it is trained: its weights, or adapters beside them."""
    host, training = host_of(lesson.base), lesson.training
    if group.sharded:
        with group.together():
            return host.trainee(lesson.base, group.place(lesson.device), shard=True)
    if not training.rank:
        return host.trainee(lesson.base, group.place(lesson.device), training.held)
    return host.adapting(lesson.base, lesson.source, Beside(training.rank, training.adapters == SHARED, lesson.seed))


def problem_of(trainee: Trainee, lesson: Lesson, group: Ranks) -> Raising:
    """What the loop solves: every batch where the family lies."""
    family, anatomy = trainee.family, trainee.anatomy
    text, aside = (tuple(one.on(trainee.where) for one in some) for some in (lesson.text, lesson.aside))
    with group.together():
        teacher = trainee.original()
    problem = Raising(trainee, teacher, lesson.training, lesson.steps, text, aside, (), lesson.seed, group)
    named = list(family.members.values()) or [problem.space.smallest]
    watched = dict.fromkeys(settled(one, family, anatomy) for one in named)
    return replace(problem, watched=tuple(one for one in watched if not one.full))


def state_of(lesson: Lesson, problem: Raising) -> State | None:
    """Where to go on from, where the family lies."""
    state = State.of(Pieces(lesson.folder, problem.ranks).read(lesson.kept)) if lesson.kept else lesson.state
    return None if state is None else state.on(problem.trainee.where)


def timed(problem: Raising) -> tuple[float, float]:
    """Seconds of a look at the text held out, and of a step."""
    start = problem.init()
    began = time.perf_counter()
    with torch.no_grad():
        problem.error(start)
    look = time.perf_counter() - began
    with torch.enable_grad():
        problem.gradients(start, At(0, 0))
        began = time.perf_counter()
        for turn in range(TIMED):
            problem.gradients(start, At((turn + 1) * problem.steps // (TIMED + 1), turn % problem.batches))
    return look, (time.perf_counter() - began) / TIMED


def outcome(problem: Raising, lesson: Lesson, state: State) -> tuple[Mapping[str, Tensor], dict[str, float]]:
    """What was learnt, as it will be stored, and its errors."""
    best = {key: one.cpu() for key, one in state.best.items()}
    learnt = rounded(best, dict.fromkeys(best, HALF) if lesson.training.rank else stored(lesson.base))
    errors = problem.errors(learnt)
    if not problem.ranks.sharded:
        return learnt, errors
    pieces = Pieces(lesson.folder, problem.ranks)
    pieces.write(LEARNT, learnt)
    return pieces.joined(LEARNT), errors


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Kernels of a GPU that add up in one order, where there are such: a run that goes on ends with the same bytes."""
    if device == CPU:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is begun
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
