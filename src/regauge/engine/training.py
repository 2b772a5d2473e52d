"""`learn train`: a family made as its recipe says, and its members trained together on the user's text.

    receipt = train("once-for-all", "path/or/hub-id", "OUT", text="novels/")

The family is made first, without training (`apply`: exact moves that sort streams, so that prefixes are the best), and
lies beside what is in the making. Then the loop trains it. The best of all looks at windows that are never trained
on is kept, the family as it was among them. A run that was killed goes on from the last kept state and ends with the
same bytes; where a time is given the pace is measured first, and a resumed run keeps the number of steps.

`torchrun --nproc-per-node 2 -m regauge learn train …` shares every batch between processes of one machine; the first
makes the family, keeps the state and writes. With `--shard` each holds a part of every tensor (`learn/shards.py`) and
keeps that part; the first joins them when it writes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regauge.artifact.adapters import FILE as ADAPTERS
from regauge.artifact.adapters import adapters_bytes
from regauge.artifact.config import CARRIED
from regauge.artifact.disk import put
from regauge.artifact.ownership import refuse_out
from regauge.artifact.receipt import Receipt, TrainedReceipt
from regauge.artifact.staging import STATES, Staging
from regauge.engine.api import apply
from regauge.engine.dividing import divided, held_to
from regauge.engine.following import OVER, Over, follow
from regauge.engine.gating import gated
from regauge.engine.lesson import HALF, Lesson, outcome, problem_of, repeatable, state_of, timed, trainee_of
from regauge.engine.pieces import LOOP, Pieces
from regauge.engine.raised import thinned, write
from regauge.engine.raising import Batch, Raising
from regauge.engine.receipts import command_line, log_of, versions
from regauge.engine.recovery_text import LOOKS, SPARE
from regauge.engine.routing import routed
from regauge.engine.training_classes import Classed, statistics
from regauge.engine.training_images import Pictured
from regauge.engine.training_recipe import Asked, read_recipe, refuse_device
from regauge.engine.training_refusals import fitting
from regauge.engine.training_text import Reading, opened, reading
from regauge.engine.watchdog import Clock, PeakMemory, Watcher, nobody, quiet_torch
from regauge.errors import BudgetError, ModelError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.learn.base import Parameters
from regauge.learn.loop import ENDED, State, Watch, due
from regauge.learn.loop import train as loop
from regauge.learn.ranks import ALONE, Ranks, ranks
from regauge.learn.training import Training
from regauge.plan import Plan, digest
from regauge.text.corpora import Where

PLANNED, FAMILY = "training", "family"


def train(
    recipe: str | Path | Plan,
    model: str | Path,
    out: str | Path,
    text: Where | None = None,
    asked: Asked | None = None,
    progress: Watcher | None = None,
) -> Receipt:
    """Makes a family and trains it.

    Args:
        recipe: with `family` and `train`.
        text: to train on and to hold some out of; None: the model samples its own.

    Raises:
        RegaugeError: any refusal, before any work; what was learnt stays for the next run.
    """
    asked, clock, began = asked or Asked(), Clock(progress or nobody), time.monotonic()
    with ranks(asked.shard) as group, quiet_torch(), repeatable(asked.device), PeakMemory() as memory:
        if not group.first:
            return follow(group, clock)
        clock.say("open")
        plan, training = read_recipe(recipe, asked.amounts)
        refuse_device(training, asked.device)
        source = host_of(model).open(model, asked.revision)
        fitting(plan, training, source, asked)
        scales = source.anatomy.plumbing.scales
        target = Path(out).expanduser().absolute()
        refuse_out(target, asked.force, CARRIED)
        if (why := host_of(source.path).why_not_fed(source)) and not scales:
            raise ModelError(f"training reads text through the model, and {why}.")
        read = opened(source, text, asked.amounts, asked.seed)
        with Staging(target, _identity(plan, source, read, asked, group), force=asked.force) as staging:
            threads = staging.notes.get("threads")
            staging.note("threads", torch.get_num_threads() if threads is None else threads)
            with quiet_torch(threads if isinstance(threads, int) else None):
                base = _made(plan, model, staging, (None if scales else text, asked), clock)
                work = _Work(source, base, training, asked, group, staging, clock, began)
                told, learnt = work.run(reading(read, source, training.batch, staging, clock))
                log = log_of(clock, memory, asked.command or command_line())
                receipt = write(base, source, learnt, staging, told | held_to(source, training, base), log)
        group.same(receipt.model_dump())
        clock.say("finish", f"{target} is written")
    return receipt


def _made(plan: Plan, model: str | Path, staging: Staging, given: tuple[Where | None, Asked], clock: Clock) -> Path:
    """The family without training, beside what is in the making."""
    base = staging.root / STATES / FAMILY
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        text, asked = given
        watch = clock.within(FAMILY)
        made, at = divided(plan, model, asked, staging)
        apply(replace(plan, train={}), made, base, calibration=text, seed=asked.seed, revision=at, progress=watch)
    return base


@dataclass(frozen=True, eq=False)
class _Work:
    """One training under way, in the process that writes."""

    source: Source
    base: Path
    training: Training
    asked: Asked
    group: Ranks
    staging: Staging
    clock: Clock
    began: float
    _last: list[State] = field(default_factory=list)

    @property
    def pieces(self) -> Pieces:
        """Where processes keep what each holds."""
        return Pieces(self.staging.root / STATES, self.group)

    def run(self, read: Reading | Pictured | Classed) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
        """What the receipt is told, and what was learnt."""
        amounts, training = self.asked.amounts, self.training
        tokens = amounts.tokens or training.steps * training.batch
        text = read.text(tokens, self.staging, self.clock)
        planned: Any = self.staging.notes.get(PLANNED)
        lesson = self._lesson(text, read.aside, planned if isinstance(planned, int) else 0)
        self.group.same(lesson)
        trainee = trainee_of(lesson, self.group)
        problem = problem_of(trainee, lesson, self.group)
        alone = problem if self.group.sharded else replace(problem, ranks=ALONE)
        if not isinstance(planned, int):
            planned = self._planned(alone, lesson)
            self.staging.note(PLANNED, planned)
        lesson = lesson.of(self.group.same(planned))
        problem, alone = replace(problem, steps=planned), replace(alone, steps=planned)
        first: Parameters = problem.init()
        if self.group.sharded:
            first, before = {}, alone.errors(first)
        state, ended = self._trained(problem, lesson)
        learnt, after = outcome(alone, lesson, state)
        if not self.group.sharded:
            before = alone.errors(first)
            learnt = {**learnt, **statistics(trainee, problem, learnt, self.base)}
        told = {
            "text": read.description,
            "tokens": sum(one.size for one in text),
            "held_out": sum(one.size for one in read.aside),
            "how": asdict(training) | {"steps": planned},
            "processes": self.group.count,
            "sharded": self.group.sharded,
            "device": self.asked.device,
            "steps": state.step,
            "members": {name: {"before": before[name], "after": after[name]} for name in after},
            "unit": problem.unit,
            "losses": thinned(state.losses),
            "looks": [list(look) for look in state.looks],
            "ended": ended,
        }
        if beside := trainee.stored(learnt):
            put(self.base / ADAPTERS, adapters_bytes({key: one.to(HALF) for key, one in beside.items()}))
        if training.route:
            told["routed"] = routed(alone, learnt, training.route, self.base)
        if training.gates:
            told["gated"] = gated(alone, learnt, training.gates, self.base)
        return {"trained": TrainedReceipt.model_validate(told)}, learnt

    def _lesson(self, text: tuple[Batch, ...], aside: tuple[Batch, ...], planned: int) -> Lesson:
        """What every process is told.

        Args:
            planned: steps, of a run that goes on; else 0.
        """
        asked, training = self.asked, self.training
        timed = not planned and asked.amounts.time is not None and asked.amounts.steps is None
        kept = self.pieces.kept(self.staging) if self.group.sharded else ""
        found = None if self.group.sharded else self.staging.kept(LOOP)
        state = None if found is None else State.of(found)
        told = text, aside, asked.seed, state, asked.device, timed, kept
        return Lesson(self.base, self.source.path, training, training.steps, 1, *told)

    def _planned(self, problem: Raising, lesson: Lesson) -> int:
        """How many steps: as the recipe or the user says, or as there is time for."""
        limit = self.asked.amounts.time
        if not lesson.timed or limit is None:
            return self.training.steps
        self.clock.say("text", "steps are timed")
        look, step = timed(problem)
        step /= self.group.count // problem.ranks.count  # what one took alone, all share
        left = limit - (time.monotonic() - self.began)
        found = int((left * SPARE - (LOOKS + 3) * look) / step)
        if found < 1:
            raise BudgetError(
                f"the time of {limit:.0f} s does not suffice: a step takes {step:.1f} s and a look at text held out "
                f"{look:.1f} s; give it more time or a shorter --length."
            )
        return found

    def _trained(self, problem: Raising, lesson: Lesson) -> tuple[State, str]:
        self.clock.start(LOOP, lesson.steps, 0 if lesson.state is None else lesson.state.step)

        def keep(state: State) -> None:
            self._last[:] = [state]
            if self.group.sharded:
                self.pieces.keep(state, self.staging)
            else:
                self.staging.keep(LOOP, state.on(torch.device("cpu")).tensors())

        try:
            watch = Watch(keep, self._tick, self.pieces.due() if self.group.sharded else due)
            state = loop(problem, lesson.settings, lesson.seed, watch, state_of(lesson, problem), problem.gradients)
        except Over:
            return self._last[0], OVER
        return state, ENDED[state.ended]

    def _tick(self, done: int, total: int) -> None:
        self.clock.show(LOOP, done, total)
        limit = self.asked.amounts.time
        over = limit is not None and time.monotonic() - self.began > limit
        if done < total and self.group.any(over):
            raise Over(OVER)


def _identity(plan: Plan, source: Source, read: Any, asked: Asked, group: Ranks) -> dict[str, object]:
    return {
        "plan": digest(plan),
        "source": source.digest(),
        "text": read.identity,
        "asked": asked.amounts.told,
        "seed": asked.seed,
        "processes": group.count,
        "sharded": group.sharded,
        "device": asked.device,
        "versions": versions(),
    }
