"""What every process of a training but the first does: its part of each batch."""

from __future__ import annotations

from dataclasses import replace

from regauge.artifact.receipt import Receipt
from regauge.engine.lesson import outcome, problem_of, state_of, timed, trainee_of
from regauge.engine.pieces import Pieces
from regauge.engine.watchdog import Clock
from regauge.errors import BudgetError
from regauge.learn.loop import State, Watch, due
from regauge.learn.loop import train as loop
from regauge.learn.ranks import Ranks

OVER = "the time was over"


class Over(BudgetError):
    """The time is over; what was learnt so far is kept and written."""


def follow(group: Ranks, clock: Clock) -> Receipt:
    """Trains what the first tells, until the first says what was written."""
    lesson = group.same(None)
    problem = problem_of(trainee_of(lesson, group), lesson, group)
    if lesson.timed and group.sharded:
        timed(problem)
    lesson = lesson.of(group.same(None))
    problem = replace(problem, steps=lesson.steps)
    pieces, last = Pieces(lesson.folder, group), list[State]()
    if group.sharded:
        problem.errors(problem.init())

    def keep(state: State) -> None:
        last[:] = [state]
        if group.sharded:
            pieces.keep(state, None)

    def tick(done: int, total: int) -> None:
        if done < total and group.any(False):
            raise Over(OVER)

    try:
        watch = Watch(keep, tick, pieces.due() if group.sharded else due)
        state = loop(problem, lesson.settings, lesson.seed, watch, state_of(lesson, problem), problem.gradients)
    except Over:
        clock.say("finish", OVER)
        state = last[0]
    if group.sharded:
        outcome(problem, lesson, state)
    return Receipt.model_validate(group.same(None))
