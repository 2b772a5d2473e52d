"""`learn recover`: what an artifact left in full precision, trained towards the original's logits on the user's text.

    receipt = recover("OUT", text="novels/", time_limit=1200)

Codes stay. What is trained: the steps of every matrix (as they are stored: learnt, then stored again), gains and
biases, an embedding or head that was not rounded, low-rank terms that are there, and new ones where `rank` asks for
them. The best of all looks at windows that are never trained on is kept, the artifact as it was among them; so the
result is never worse there. The artifact is replaced by one rename once the new one is whole, or written to `out`; a
run that was killed goes on and ends with the same bytes.

Where a time is given, the pace is measured first and the number of steps follows from it; a resumed run keeps that
number. Memory: one block in float32 a few times over, the tables outside the blocks, the states of one batch behind
each block, and five numbers for each that is trained; the original's last states lie in mapped files.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regauge.artifact import files
from regauge.artifact.config import CARRIED
from regauge.artifact.ownership import refuse_out
from regauge.artifact.receipt import Receipt
from regauge.artifact.staging import STATES, Staging
from regauge.engine.distilling import Distilling, Original, listen
from regauge.engine.pupil import Pupil
from regauge.engine.receipts import command_line, log_of, versions
from regauge.engine.recovered import Opened, opened, write
from regauge.engine.recovery_text import (
    BATCH,
    LOOKS,
    STEPS,
    Amounts,
    Material,
    Pace,
    batches,
    held_out,
    material,
    timed,
    to_train_on,
)
from regauge.engine.watchdog import Clock, PeakMemory, Watcher, nobody, quiet_torch
from regauge.errors import BudgetError
from regauge.hosts.states import SPILL, Spill
from regauge.learn.loop import ENDED, State, Watch, train
from regauge.learn.settings import Settings
from regauge.text.corpora import Where

LOOP, PLANNED = "recovering", "recovery"
OVER = "the time was over"


class _Over(BudgetError):
    """The time is over; what was learnt so far is kept and written."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a recovery beside its artifact and text.

    Attributes:
        rank: of low-rank terms to add to every matrix of the blocks; 0 for none.
        force: replace an `out` that exists.
    """

    amounts: Amounts = field(default_factory=Amounts)
    rank: int = 0
    seed: int = 0
    out: Path | None = None
    force: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for value, what in ((self.amounts.steps, "steps"), (self.amounts.tokens, "tokens")):
            if value is not None and value < 1:
                raise BudgetError(f"a recovery takes 1 or more {what}; you wrote {value}.")
        if self.rank < 0:
            raise BudgetError(f"a rank is 0 (no low-rank terms) or more; you wrote {self.rank}.")


def recover(
    artifact: str | Path,
    text: Where | None = None,
    original: str | Path | None = None,
    asked: Asked | None = None,
    progress: Watcher | None = None,
) -> Receipt:
    """Trains an artifact towards its original, and writes it anew.

    Args:
        artifact: a directory that regauge made.
        text: to train on and to hold some out of; None: the original samples its own.
        original: the model that it was made of; None: as its receipt says.

    Raises:
        RegaugeError: any refusal, before any work; what was learnt stays for the next run.
    """
    asked, folder = asked or Asked(), Path(artifact).expanduser().absolute()
    clock, began = Clock(progress or nobody), time.monotonic()
    out = folder if asked.out is None else asked.out.expanduser().absolute()
    with quiet_torch(), PeakMemory() as memory:
        clock.say("open")
        refuse_out(out, asked.force or out == folder, CARRIED)
        found = opened(folder, original, asked.rank)
        read = material(found.source, text, asked.amounts, asked.seed)
        with Staging(out, _identity(found, read, asked), force=asked.force or out == folder) as staging:
            threads = staging.notes.get("threads")
            staging.note("threads", torch.get_num_threads() if threads is None else threads)
            with quiet_torch(threads if isinstance(threads, int) else None):
                work = _Work(found, read, asked, staging, clock, began)
                pupil, state, told = work.run()
                log = log_of(clock, memory, asked.command or command_line())
                receipt = write(found, pupil, state.best, staging, told, log)
        clock.say("finish", f"{out} is written")
    return receipt


@dataclass(frozen=True, eq=False)
class _Work:
    """One recovery under way."""

    found: Opened
    read: Material
    asked: Asked
    staging: Staging
    clock: Clock
    began: float
    _last: list[State] = field(default_factory=list)

    def run(self) -> tuple[Pupil, State, dict[str, object]]:
        """What was trained, where its loop ended, and what is told of it."""
        source, clock = self.found.source, self.clock
        pupil = Pupil(self.found.artifact, self.asked.rank)
        aside = held_out(self.read, source, self.staging, clock)
        began = time.monotonic()
        second = self._listen(batches(aside), "held out")
        heard = (time.monotonic() - began) / aside.tokens
        problem = Distilling(pupil, self.found.runner, second, batches(aside), held_out=len(second.last))
        planned: Any = self.staging.notes.get(PLANNED)
        if not isinstance(planned, dict):
            planned = self._plan(problem, heard)
            self.staging.note(PLANNED, planned)
        steps, tokens = int(planned["steps"]), int(planned["tokens"])
        windows = to_train_on(self.read, source, self.staging, clock, tokens)
        first = self._listen(batches(windows), "to train on")
        problem = replace(
            problem,
            original=replace(second, last=(*first.last, *second.last)),
            ids=(*batches(windows), *batches(aside)),
        )
        state, ended = self._train(problem, steps)
        told: dict[str, object] = {
            "text": windows.description,
            "tokens": windows.tokens,
            "held_out": aside.tokens,
            "rank": self.asked.rank,
            "parameters": sum(value.numel() for value in state.best.values()),
            "steps": state.step,
            "before": state.first,
            "after": state.least,
            "ended": ended,
        }
        return pupil, state, {**told, "notes": pupil.notes()}

    def _plan(self, problem: Distilling, heard: float) -> dict[str, object]:
        """Steps and tokens: as the user says, or as there is time for."""
        amounts, most = self.asked.amounts, self.asked.amounts.tokens or 1 << 30
        steps = amounts.steps or STEPS
        if amounts.time is not None and amounts.steps is None:
            self.clock.say("text", "a step is timed")
            start = problem.init()
            look = timed(partial(_look, problem, start)) if problem.pupil.small else _once(problem, start)
            step = timed(partial(_step, problem, start))
            left = amounts.time - (time.monotonic() - self.began)
            if left < step + 3 * look:
                raise BudgetError(
                    f"the time of {amounts.time:.0f} s does not suffice: a step takes {step:.0f} s and a look at the "
                    f"text held out {look:.0f} s; give it more time or a shorter --length."
                )
            steps = Pace(heard, step, look).steps(left, BATCH, most)
        return {"steps": steps, "tokens": min(most, steps * BATCH)}

    def _listen(self, ids: list[torch.Tensor], which: str) -> Original:
        source, blocks = self.found.source, self.found.source.anatomy.blocks
        phase = f"the original on the text {which}"
        self.clock.start(phase, blocks)
        runner = self.found.teacher
        size = sum(batch.numel() for batch in ids) * source.anatomy.hidden * 4
        folder = self.staging.root / STATES
        folder.mkdir(parents=True, exist_ok=True)
        keep = Spill(folder) if size > SPILL else lambda hidden: hidden
        return listen(runner, source.block, ids, keep, lambda done: self.clock.show(phase, done, blocks))

    def _train(self, problem: Distilling, steps: int) -> tuple[State, str]:
        settings = Settings(steps=steps, batch=BATCH, schedule="cosine", patience=0, every=math.ceil(steps / LOOKS))
        kept = self.staging.kept(LOOP)
        state = None if kept is None else State.of(kept)
        self.clock.start(LOOP, steps, 0 if state is None else state.step)

        def keep(state: State) -> None:
            self._last[:] = [state]
            self.staging.keep(LOOP, state.tensors())

        try:
            state = train(problem, settings, self.asked.seed, Watch(keep=keep, tick=self._tick), state)
        except _Over:
            return self._last[0], OVER
        return state, ENDED[state.ended]

    def _tick(self, done: int, total: int) -> None:
        self.clock.show(LOOP, done, total)
        time_limit = self.asked.amounts.time
        if time_limit is not None and done < total and time.monotonic() - self.began > time_limit:
            raise _Over(OVER)


def _look(problem: Distilling, start: Mapping[str, torch.Tensor]) -> object:
    with torch.no_grad():
        return problem.error(start)


def _once(problem: Distilling, start: Mapping[str, torch.Tensor]) -> float:
    """Seconds of a look at the windows held out, of a model of which one look is long."""
    began = time.perf_counter()
    _look(problem, start)
    return time.perf_counter() - began


def _step(problem: Distilling, start: Mapping[str, torch.Tensor]) -> object:
    leaves = {name: value.detach().requires_grad_() for name, value in start.items()}
    with torch.enable_grad():
        return torch.autograd.grad(problem.loss(leaves, 0, 0.0), list(leaves.values()), allow_unused=True)


def _identity(found: Opened, read: Material, asked: Asked) -> dict[str, object]:
    digest = hashlib.sha256()
    for path in found.artifact.shards:
        digest.update(files.sha256(path).encode())
    return {
        "recovered": digest.hexdigest(),
        "original": found.source_hash,
        "text": read.identity,
        "asked": {**asked.amounts.told, "rank": asked.rank},
        "seed": asked.seed,
        "versions": versions(),
    }
