"""Learning at the scope of the model: ranges of weights, static steps of inputs and scales of streams of all blocks,
trained together towards the original's output, before the streaming pass that carries them out.

A survey streams the model once, as the recipe has it before anything is learnt, for the moves of each block and the
steps that calibration gives. Then `learn/loop.py` trains everything as one problem (`engine/distilling.py`): weights
are moved, rounded to nearest and read with rounded inputs in each step, gradients passed straight through. What comes
out are moves, formats and readings like any others, so the pass itself learns nothing.

A fifth of the batches are held out: what is kept is never worse on them than where training began. The loop's state
stays in the staged output, so a run that was killed goes on there and ends with the same bytes.
Cost: the survey, the original once, and the whole model forward and backward for each step. Of a large model one block
at a time is in memory, made again from its file and its moves in each step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch

from regauge.anatomy import moves as algebra
from regauge.anatomy.model import Weights
from regauge.anatomy.moves import Move
from regauge.artifact.staging import STATES, Staging
from regauge.engine.block import changes, effective
from regauge.engine.distilling import Distilling, listen
from regauge.engine.inner import inner_of, words
from regauge.engine.job import Job
from regauge.engine.learning import learnt_readings
from regauge.engine.pupil import HELD
from regauge.engine.taps import settle
from regauge.engine.watchdog import Clock
from regauge.engine.work import Pass
from regauge.formats.base import JOINED
from regauge.formats.readings import Reading
from regauge.hosts.states import SPILL, Spill
from regauge.learn.base import Finished, Learned, Parameters, Rates, Taught, Trial
from regauge.learn.joint import OnScales
from regauge.learn.loop import ENDED, State, Watch, train
from regauge.learn.settings import MODEL
from regauge.learn.sites import OnSite, Together
from regauge.plan.learnable import static_taps
from regauge.rewrites.joining import Known, LearntScales
from regauge.text.calibration import Calibration

T = TypeVar("T")
LOOP = "learning-model"
ASIDE = 5
"""One batch of so many is held out, where there are so many."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is trained of one block, or of what lies outside the blocks.

    Attributes:
        parts: trained together; those of the weights last.
        trial: the block before them, in float32.
    """

    parts: Together
    trial: Trial

    def tried(self, parameters: Parameters, progress: float = 1.0) -> Trial:
        return self.parts.apply(parameters, self.trial, progress)


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A model as a recipe has it before anything is learnt.

    Attributes:
        moves: block → those that its rewrites make beside the whole model's.
        outer: tensors outside the blocks, tables rounded.
        readings: tap → how it is read.
    """

    job: Job
    moves: Mapping[int, Sequence[Move]]
    outer: Weights
    readings: Mapping[str, Reading]
    _kept: dict[int | None, Lesson] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return self.job.anatomy.blocks

    @cached_property
    def small(self) -> bool:
        return sum(site.shape[0] * site.shape[1] for site in self.job.anatomy.sites) <= HELD

    @cached_property
    def names(self) -> Mapping[int | None, tuple[str, ...]]:
        return {index: tuple(_named(index, self.lesson(index).parts.rates)) for index in (None, *range(self.blocks))}

    @cached_property
    def rates(self) -> Rates:
        all_ = (None, *range(self.blocks))
        return {name: rate for index in all_ for name, rate in _named(index, self.lesson(index).parts.rates).items()}

    def init(self) -> Parameters:
        found: dict[str, torch.Tensor] = {}
        for index in (None, *range(self.blocks)):
            lesson = self.lesson(index)
            found |= _named(index, lesson.parts.init(lesson.trial))
        return found

    def lesson(self, index: int | None) -> _Called:
        """One block; None for what lies outside the blocks."""
        found = self._kept.get(index)
        if found is None:
            found = self._outside() if index is None else self._block(index)
        if self.small:
            self._kept[index] = found
        return _Called(index, found)

    def finish(self, parameters: Parameters) -> dict[int | None, Finished]:
        """What was learnt, a block each."""
        made: dict[int | None, Finished] = {}
        with torch.no_grad():
            for index in (None, *range(self.blocks)):
                lesson = self.lesson(index)
                own = lesson.own(parameters)
                made[index] = lesson.parts.finish(own, lesson.trial)
        return made

    def _outside(self) -> Lesson:
        job = self.job
        sites, weights = job.sites(None), {name: tensor.float() for name, tensor in self.outer.items()}
        steps = learnt_readings(sites, static_taps(job.resolution.inputs), self.readings)
        return Lesson(Together({one.tap: one for one in steps}), Trial(weights, changes(sites, self.readings, True)))

    def _block(self, index: int) -> Lesson:
        job, inner = self.job, inner_of(self.job.anatomy, self.job.resolution.inputs, index)
        weights = algebra.apply(job.moves, job.source.anatomy, job.source.block(index), dtype=torch.float64)
        weights = algebra.apply(self.moves[index], job.whole, weights, dtype=torch.float32)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        sites = [site for site in job.sites(index) if f"{site.name}.weight" in weights]
        inside = {word: replace(reading, soft=True) for word, reading in words(inner, self.readings).items()}
        trial = Trial(weights, changes(sites, self.readings, True), inside)
        found: dict[str, Learned] = {}
        for recast in job.local:
            if JOINED in recast.rewrite.needs:
                scales: LearntScales = recast.rewrite  # type: ignore[assignment]  # the contract of that need
                found[recast.name] = OnScales(job.whole, scales.of(job.whole, index), scales.rate)
        steps = static_taps(job.resolution.inputs)
        found |= {one.tap: one for one in learnt_readings(sites, steps, self.readings, inner)}
        rounded = [site.name for site in sites if job.choices.get(site.name) is not None]
        for name in rounded:
            found[name] = OnSite(name, job.learnt.get(name, Taught()), job.format(name))
        return Lesson(Together(found), trial)


@dataclass(frozen=True, eq=False)
class _Called:
    """A lesson whose parameters bear the number of its block before their names."""

    index: int | None
    lesson: Lesson

    @property
    def parts(self) -> Together:
        return self.lesson.parts

    @property
    def trial(self) -> Trial:
        return self.lesson.trial

    def own(self, parameters: Parameters) -> Parameters:
        return {name: parameters[_name(self.index, name)] for name in self.parts.rates}

    def tried(self, parameters: Parameters, progress: float = 1.0) -> Trial:
        return self.lesson.tried(self.own(parameters), progress)


def _name(index: int | None, own: str) -> str:
    return f"{'outside' if index is None else index} » {own}"


def _named(index: int | None, values: Mapping[str, T]) -> dict[str, T]:
    return {_name(index, own): value for own, value in values.items()}


def whole(
    job: Job, windows: Calibration | None, staging: Staging, clock: Clock
) -> tuple[Job, tuple[dict[str, object], ...]]:
    """The job with what training at the scope of the model leaves, and what is told of it; as it was where its recipe
    trains block by block, or not at all.

    Raises:
        BudgetError: the time limit does not suffice; what was learnt so far stays for the next run.
    """
    if windows is None or job.settings.scope != MODEL:
        return job, ()
    surveyed = survey(job, windows, clock)
    problem = _problem(surveyed, windows, staging, clock)
    state = _trained(problem, job, staging, clock)
    finished = surveyed.finish(state.best)
    recasts = [
        replace(recast, rewrite=Known({block: done.moves for block, done in finished.items() if block is not None}))
        if JOINED in recast.rewrite.needs
        else recast
        for recast in job.recasts
    ]
    told: dict[str, object] = {
        "scope": MODEL,
        "sites": list(job.learnt),
        "taps": list(static_taps(job.resolution.inputs)),
        "streams": sum(len(done.moves) for done in finished.values()),
        "parameters": sum(value.numel() for value in state.best.values()),
        "held_out": sum(ids.numel() for ids in problem.ids[problem.batches :]) if problem.held_out else 0,
        "steps": state.step,
        "before": state.first,
        "after": state.least,
        "ended": ENDED[state.ended],
    }
    return replace(job, recasts=tuple(recasts), finished=finished), (told,)


def survey(job: Job, windows: Calibration, clock: Clock) -> Surveyed:
    """Streams the model once as the recipe has it before anything is learnt."""
    work, known = Pass(job, windows), len(job.moves)
    outer = work.read(None)
    sites = job.sites(None)
    running = effective(
        outer.stored, work.round([s for s in sites if s.name != "head"], outer, {}), job.choices, torch.float32
    )
    work.begin(running, outer.exact)
    moves: dict[int, Sequence[Move]] = {}
    clock.start("survey", job.anatomy.blocks)
    for block in range(job.anatomy.blocks):
        moved, *_ = work.local(block, work.read(block))
        moves[block] = moved.moves[known:]
        looked = work.look(block, moved)
        codes = work.round(job.sites(block), looked.moved, looked.stats)
        work.advance(block, work.built(looked.moved, codes))
        clock.tick("survey", block + 1, job.anatomy.blocks)
    stats, _ = work.see_head(running)
    work.readings |= settle(sites, job.resolution.inputs, {}, stats, {})
    head = [site for site in sites if site.name == "head" and "head.weight" in outer.stored]
    running |= effective({}, work.round(head, outer, stats), job.choices, torch.float32)
    return Surveyed(job, moves, running, dict(work.readings))


def _problem(surveyed: Surveyed, windows: Calibration, staging: Staging, clock: Clock) -> Distilling:
    job = surveyed.job
    batches = windows.batches(job.settings.batch)
    phase, blocks = "the original on the text", job.anatomy.blocks
    clock.start(phase, blocks)
    size = sum(batch.numel() for batch in batches) * job.source.anatomy.hidden * 4
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden  # noqa: E731  # the default of two
    if size > SPILL:
        folder = staging.root / STATES / LOOP
        folder.mkdir(parents=True, exist_ok=True)
        keep = Spill(folder)
    teacher = job.host.runner(job.source)
    original = listen(teacher, job.source.block, batches, keep, lambda done: clock.show(phase, done, blocks))
    head = "head" in {site.name for site in job.anatomy.sites}
    runner = job.host.runner(job.source, anatomy=job.anatomy)
    return Distilling(surveyed, runner, original, batches, len(batches) // ASIDE, head)


def _trained(problem: Distilling, job: Job, staging: Staging, clock: Clock) -> State:
    kept = staging.kept(LOOP)
    state = None if kept is None else State.of(kept)
    phase, settings = "learning the whole model", job.settings
    clock.start(phase, settings.steps, 0 if state is None else state.step)
    watch = Watch(
        keep=lambda state: staging.keep(LOOP, state.tensors()),
        tick=lambda done, total: clock.tick(phase, done, total),
    )
    digest = hashlib.sha256(f"{job.seed} {LOOP}".encode()).digest()
    state = train(problem, settings, int.from_bytes(digest[:6], "big"), watch, state)
    staging.keep(LOOP, state.tensors())  # ended: a resumed run trains no more
    return state
