"""Learning inside the streaming pass: the parts of one block, trained together by `learn/loop.py` on the block's error.

A loop is kept in the staged output every few seconds, so that a run that was killed in the middle of a block goes on
there and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Site, Weights
from regauge.artifact.staging import Staging
from regauge.engine.job import Job
from regauge.engine.objective import Objective
from regauge.engine.watchdog import Clock
from regauge.formats.base import Format
from regauge.formats.readings import Reading
from regauge.formats.transforms import Same, Transform
from regauge.learn.base import Finished, Parameters, Rates, Taught, Trial
from regauge.learn.joint import OnReading
from regauge.learn.loop import ENDED, NOT_FINITE, State, Watch, train
from regauge.learn.settings import Settings
from regauge.learn.sites import OnStreams, OnTap, Together, fitted, on_sites
from regauge.parts import Point
from regauge.plan.learnable import learnt_of_tap
from regauge.rounding.base import Stats


@dataclass(frozen=True, eq=False)
class BlockProblem:
    """The parts of one block and its objective, as the loop takes them.

    Attributes:
        parts: what is trained.
        trial: the block as it is without them: float32, what is not learnt already rounded.
    """

    parts: Together
    trial: Trial
    objective: Objective

    @property
    def rates(self) -> Rates:
        return self.parts.rates

    @property
    def batches(self) -> int:
        return self.objective.batches

    def init(self) -> Parameters:
        return self.parts.init(self.trial)

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        tried = self.parts.apply(parameters, self.trial, progress)
        loss = tried.joint(lambda weights: self.objective.miss(weights, batch, tried.inputs))
        return loss if tried.penalty is None else loss + tried.penalty.sum()

    def error(self, parameters: Parameters) -> float:
        tried = self.parts.apply(parameters, self.trial, 1.0)
        return float(tried.joint(lambda weights: _number(self.objective.error(weights, tried.inputs))))


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Learnt:
    """What became of a block's learnt parts.

    Attributes:
        finished: what training leaves: formats with the steps that were learnt, and codes.
        told: for the receipt.
        notes: what the user did not ask for, a sentence each.
    """

    finished: Finished
    told: Mapping[str, object]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is to be learnt in one block.

    Attributes:
        block: its number.
        taught, formats: site → what is learnt there, and the format that it is about.
        weights: of the block, exact where they are learnt, rounded where they are not.
        stats: site → statistics of its input, of those that want some to begin with.
        seed: of the whole job.
        taps: whose transforms are learnt; weights that read them are as they are without any.
        steps: taps whose static step is learnt.
        streams: rewrite → its moves that are learnt.
    """

    block: int
    taught: Mapping[str, Taught]
    formats: Mapping[str, Format]
    weights: Weights
    stats: Mapping[str, Stats] = field(default_factory=dict)
    seed: int = 0
    taps: tuple[OnTap, ...] = ()
    steps: tuple[OnReading, ...] = ()
    streams: Mapping[str, OnStreams] = field(default_factory=dict)


def room(block: int) -> str:
    """Name under which the loop of a block is kept in the staged output."""
    return f"learning-{block}"


def learnt_taps(sites: Sequence[Site], job: Job, known: Mapping[str, Transform]) -> tuple[OnTap, ...]:
    """What is trained of the taps that some sites of a block read.

    Args:
        known: tap → its transform, of those that have one.
    """
    points = job.learnt_taps
    found: dict[str, list[Site]] = {}
    for site in sites:
        if site.tap in points:
            found.setdefault(site.tap or "", []).append(site)
    made = []
    for tap, own in found.items():
        names, axes, fmt = tuple(site.name for site in own), learnt_of_tap(points[tap]), parts.format_of(points[tap])
        maker: Any = parts.maker_of(points[tap]) if "transform" in axes else None  # it needs the objective: that is
        clip: Any = fmt.ranger if "ranger" in axes else None  # the contract, of both
        made.append(OnTap(tap, names, own[0].shape[1], fmt, maker, clip, known.get(tap, Same())))
    return tuple(made)


def learnt_readings(
    sites: Sequence[Site], points: Mapping[str, Point], readings: Mapping[str, Reading], inner: Sequence[str] = ()
) -> tuple[OnReading, ...]:
    """What is trained of the steps of taps.

    Args:
        sites: of a block.
        points: of the taps whose step is trained.
        readings: with the steps that calibration gave.
        inner: taps of the block that no matrix reads.
    """
    readers: dict[str, list[str]] = {tap: [] for tap in inner}
    for site in sites:
        readers.setdefault(site.tap or "", []).append(site.name)
    found = []
    for tap, names in readers.items():
        if tap in points:
            maker: Any = parts.format_of(points[tap]).ranger  # it needs the objective: that is the contract
            found.append(OnReading(tap, tuple(names), maker, readings[tap]))
    return tuple(found)


def learnt_streams(job: Job, block: int) -> dict[str, OnStreams]:
    """The rewrites whose moves are trained in a block, by name."""
    made: list[tuple[str, Any]] = [(recast.name, recast.rewrite) for recast in job.trained]
    return {name: OnStreams(rewrite, job.whole, block) for name, rewrite in made}


def learn(lesson: Lesson, objective: Objective, settings: Settings, staging: Staging | None, clock: Clock) -> Learnt:
    """Trains the parts of a block; goes on from what an earlier run kept.

    Raises:
        BudgetError: the time limit does not suffice; what was learnt so far stays for the next run.
    """
    trial = Trial({name: tensor.float() for name, tensor in lesson.weights.items()})
    moving = {site for one in lesson.taps for site in one.sites}  # their weights change while they are trained
    formats = {
        name: fmt
        if lesson.taught[name].ranger is not None or name in moving or lesson.streams
        else fitted(fmt, trial.weights[f"{name}.weight"])
        for name, fmt in lesson.formats.items()
    }
    parts = on_sites(lesson.taught, formats, lesson.stats, (*lesson.taps, *lesson.steps), lesson.streams)
    name = room(lesson.block)
    kept = None if staging is None else staging.kept(name)
    state = None if kept is None else State.of(kept)
    phase = f"learning block {lesson.block}"
    clock.start(phase, settings.steps, 0 if state is None else state.step)
    watch = Watch(
        keep=lambda state: None if staging is None else staging.keep(name, state.tensors()),
        tick=lambda done, total: clock.tick(phase, done, total),
    )
    digest = hashlib.sha256(f"{lesson.seed} {lesson.block}".encode()).digest()
    state = train(BlockProblem(parts, trial, objective), settings, int.from_bytes(digest[:6], "big"), watch, state)
    with torch.no_grad():
        finished = parts.finish(state.best, trial)
    taps = [*(one.tap for one in lesson.taps), *(one.tap for one in lesson.steps)]
    told = {
        "block": lesson.block,
        "sites": list(lesson.taught),
        **({"taps": taps} if taps else {}),
        **({"rewrites": list(lesson.streams)} if lesson.streams else {}),
        "steps": state.step,
        "before": state.first,
        "after": state.least,
        "ended": ENDED[state.ended],
    }
    notes: tuple[str, ...] = ()
    if state.ended == NOT_FINITE:
        notes = (f"learning block {lesson.block} ended at step {state.step}: {ENDED[NOT_FINITE]}",)
    return Learnt(finished, told, notes)
