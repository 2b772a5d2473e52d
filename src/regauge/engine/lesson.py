"""What every process of a training is told, and what it makes of that: the family over which members lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regauge.elastic.legal import settled
from regauge.engine.raising import Batch, Raising
from regauge.hosts import host_of
from regauge.hosts.teaching import Beside, Trainee
from regauge.learn.loop import State
from regauge.learn.ranks import Ranks
from regauge.learn.training import SHARED, Training
from regauge.runtime.rows import CPU


@dataclass(frozen=True, eq=False)
class Lesson:
    """What every process is told.

    Attributes:
        base: the family, without training; source: the model that it was made of.
        text, aside: batches to train on, and held out.
        state: where to go on from.
        device: where members run.
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


def trainee_of(lesson: Lesson, group: Ranks) -> Trainee:
    """The family as it is trained: its weights, or adapters beside them."""
    host, training = host_of(lesson.base), lesson.training
    if not training.rank:
        return host.trainee(lesson.base, group.place(lesson.device), training.held)
    return host.adapting(lesson.base, lesson.source, Beside(training.rank, training.adapters == SHARED, lesson.seed))


def problem_of(trainee: Trainee, lesson: Lesson, group: Ranks) -> Raising:
    """What the loop solves: every batch where the family lies."""
    family, anatomy = trainee.family, trainee.anatomy
    text, aside = (tuple(one.on(trainee.where) for one in some) for some in (lesson.text, lesson.aside))
    problem = Raising(trainee, trainee.original(), lesson.training, lesson.steps, text, aside, (), lesson.seed, group)
    named = list(family.members.values()) or [problem.space.smallest]
    watched = dict.fromkeys(settled(one, family, anatomy) for one in named)
    return replace(problem, watched=tuple(one for one in watched if not one.full))


def state_of(lesson: Lesson, problem: Raising) -> State | None:
    """Where to go on from, where the family lies."""
    return None if lesson.state is None else lesson.state.on(problem.trainee.where)


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
