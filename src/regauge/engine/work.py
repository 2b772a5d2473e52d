"""The work on blocks, without files: read, move, see, round, run. The driver and the search for strengths share it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from regauge.anatomy import moves as algebra
from regauge.anatomy.model import Site, Weights
from regauge.anatomy.moves import Move
from regauge.artifact.receipt import SelectReceipt
from regauge.artifact.staging import Staging
from regauge.engine.block import Moved, as_stored, changes, effective, nearest_codes, round_sites
from regauge.engine.distribution import Bound
from regauge.engine.drift import drifts, joined, readers
from regauge.engine.inner import bound, inner_of, run, settled, words
from regauge.engine.job import Job
from regauge.engine.learning import Learnt, Lesson, learn, learnt_readings, learnt_streams, learnt_taps
from regauge.engine.objective import Change, Objective
from regauge.engine.shaping import cut_block, measured, needs_of, steps_of
from regauge.engine.statistics import Collection, collection
from regauge.engine.stored import stored
from regauge.engine.strips import by_strips
from regauge.engine.taps import Looked, after, at_once, fold, needs_of_taps, settle, stand_ins
from regauge.engine.watchdog import Clock
from regauge.formats.base import JOINED, OBJECTIVE, Codes
from regauge.formats.readings import Reading
from regauge.formats.transforms import Transform
from regauge.hosts.base import Rows, Runner
from regauge.hosts.states import Spill, States
from regauge.learn.base import Finished
from regauge.learn.settings import DISTRIBUTION, MODEL
from regauge.parts import CACHE
from regauge.plan.learnable import static_taps
from regauge.rewrites.base import TRAINED
from regauge.rounding.base import Stats
from regauge.rounding.feedback import forget
from regauge.rounding.pieces import alone, of_rows
from regauge.text.calibration import Calibration

BATCH = 2048  # tokens a batch: what a block makes of it is reused by the allocator, not mapped anew each time


class Pass:
    """A job streamed through one block after another.

    Attributes:
        states: what the compressed model has made of the text so far; None where no text is needed.
        teacher: what the uncompressed model has, in the same gauge; None unless a part asks for it.
        target: what the teacher makes of the block at hand; None before `local` has seen it.
        store: where large tensors outside the blocks go; None: memory.
        transforms, readings: tap → its transform, and how it is read, of the taps that are settled so far.
    """

    def __init__(
        self, job: Job, windows: Calibration | None, runner: Runner | None = None, store: Spill | None = None
    ) -> None:
        self.job, self.store = job, store
        size = job.settings.batch if job.learnt else BATCH
        self.batches = windows.batches(size) if windows is not None else []
        self.runner = runner
        if windows is not None and runner is None:
            self.runner = job.host.runner(job.source, anatomy=job.anatomy, dtype=job.working)
        self.whole = self.runner  # of blocks before anything is taken out of them
        if self.runner is not None and job.shaping is not None:
            self.whole = job.host.runner(job.source, anatomy=job.whole, dtype=job.working)
        self.states: States | None = None
        self.transforms: dict[str, Transform] = {}
        self.readings: dict[str, Reading] = at_once(job.resolution.inputs)
        self.teacher: States | None = None
        self.target: States | None = None

    def read(self, block: int | None) -> Moved:
        """The tensors of a block, after the moves of the whole model."""
        job = self.job
        source = job.source.block(block)
        if job.source.anatomy.tied and block is None:
            source.pop("head.weight", None)
        if not job.moves:
            return Moved(source, source, source, ())
        if block is None:
            exact, stored = by_strips(job.moves, job.source.anatomy, source, self._stored, self.store)
            return Moved(source, exact, stored, job.moves)
        exact = algebra.apply(job.moves, job.source.anatomy, source, dtype=torch.float64)
        return self._moved(source, exact, job.moves)

    def _stored(self, exact: Weights, like: Weights) -> Weights:
        return as_stored(self.job.anatomy, exact, like, self.job.source.dtype)

    def _moved(self, source: Weights, exact: Weights, moves: Sequence[Move]) -> Moved:
        return Moved(source, exact, self._stored(exact, source), tuple(moves))

    def local(self, block: int, moved: Moved) -> tuple[Moved, list[str], dict[str, str]]:
        """The block after the rewrites that work block by block, what they noted, and sites of rare experts."""
        job, notes = self.job, list[str]()
        if self.teacher is not None and self.whole is not None:
            self.target = self.whole.block(block, moved.exact, self.teacher)
        rare: dict[str, str] = {}
        for recast in job.local:
            stats: dict[str, Stats] = {}
            wanted = recast.rewrite.needs - {OBJECTIVE, TRAINED, JOINED}
            if wanted:
                needs = {site.name: wanted for site in job.sites(block) if site.tap is not None}
                stats, rare = self.see(block, moved.exact, needs, runner=self.whole)
            objective = self.objective(block, moved) if OBJECTIVE in recast.rewrite.needs else None
            anatomy, made = recast.rewrite(job.whole, moved.exact, stats, objective, block)
            notes += [note for note in anatomy.notes if note not in job.whole.notes]
            exact = algebra.apply(made, job.whole, moved.exact, dtype=torch.float64)
            moved = self._moved(moved.source, exact, (*moved.moves, *made))
        return moved, notes, rare

    def moved(self, moved: Moved, made: Sequence[Move]) -> Moved:
        """The block after more moves, which were learnt."""
        exact = algebra.apply(made, self.job.whole, moved.exact, dtype=torch.float64)
        return self._moved(moved.source, exact, (*moved.moves, *made))

    def prune(self, block: int, moved: Moved) -> tuple[Moved, list[SelectReceipt], dict[str, str]]:
        """The block after units were taken out of it, what that was measured to do, and sites of rare experts."""
        job = self.job
        cuts = [] if job.shaping is None else job.shaping.in_block(job.whole, block)
        if job.shaping is None or not cuts:
            return moved, [], {}
        anatomy, weights, runner = job.whole, moved.exact, self.whole
        rare: dict[str, str] = {}
        for kept in steps_of(cuts, job.shaping.kept):
            if anatomy is not job.whole:  # a later step of a schedule: the block has the sizes of the one before
                runner = job.host.runner(job.source, anatomy=anatomy, dtype=job.working)
            cuts = [(anatomy.stream(stream.name), cut) for stream, cut in cuts]
            stats, rarer = self.see(block, weights, needs_of(anatomy, cuts), runner=runner)
            rare |= rarer
            moves, weights = cut_block(anatomy, cuts, weights, stats, kept)
            anatomy = algebra.transform(moves, anatomy)
        after = self._moved(moved.source, weights, moved.moves)
        (own, states), whole = self.running(), self.whole
        assert whole is not None, "it runs, so the whole block does"
        runs = whole.bind(block, moved.stored, states), own.bind(block, after.stored, states)
        return after, [measured(job, block, runs, states)], rare

    def see(
        self,
        block: int,
        weights: Weights,
        needs: Mapping[str, frozenset[str]],
        sample: bool = False,
        runner: Runner | None = None,
    ) -> tuple[dict[str, Stats], dict[str, str]]:
        """Statistics of a block's inputs under some weights, and the sites whose expert was rare.

        Args:
            runner: of the sizes that the weights have, where those are not the job's.
        """
        own, states = self.running()
        sites = list((runner or own).anatomy.in_block(block))
        found = collection(sites, needs, sample)
        if found.watch:
            (runner or own).show(block, weights, states, self._watch(found))
        return found.finish(sites)

    def look(self, block: int, moved: Moved, sample: bool = False, learnt: Finished | None = None) -> Looked:
        """Settles the taps of a block: their transforms folded (those that were learnt, or what their training begins
        with), what its sites then read seen, static steps and clips."""
        job, sites = self.job, self.job.sites(block)
        inputs = job.resolution.inputs
        needs, first = needs_of_taps(sites, inputs, transforms=True), dict[str, Stats]()
        if needs:
            first, _ = self.see(block, moved.exact, needs)
        found = learnt or Finished()
        folded, transforms, proof = fold(block, sites, moved, inputs, first, found.transforms)
        self.transforms |= transforms
        needs = {site.name: job.needs[site.name] for site in sites if site.name in job.needs}
        stats, rare = self.see(block, moved.exact, needs, sample=sample) if needs else ({}, {})
        self.readings |= settle(sites, inputs, transforms, stats, found.shares)
        if any(tap not in self.readings for tap in inner_of(job.anatomy, inputs, block)):
            self.readings |= settled(*self.running(), block, moved.exact, inputs)
        if self.teacher is not None and (taps := readers(sites, needs)):
            runner, states = self.running()
            bind = lambda watch: runner.bind(block, moved.exact, states, watch=after(watch, taps, self.transforms))  # noqa: E731  # one of its kind
            stats = joined(stats, sites, drifts(taps, bind, self.teacher, states))
        return Looked(folded, stats, rare, proof)

    def _watch(self, found: Collection) -> dict[str, Callable[[Tensor], None]]:
        return after(found.watch, found.taps, self.transforms)

    def objective(self, block: int, moved: Moved, cached: bool = False) -> Objective:
        """The error of a block's output against the teacher's, under the plan's formats; `cached`: behind its cache."""
        (runner, states), job, sites = self.running(), self.job, self.job.sites(block)
        assert self.target is not None, "a plan that needs the objective has a teacher"

        def rounded(weights: Weights, which: Container[str] | None = None) -> Weights:
            tried = as_stored(job.anatomy, weights, moved.source, job.source.dtype)
            present = [site for site in sites if f"{site.name}.weight" in weights]
            present = [site for site in present if which is None or site.name in which]
            return effective(tried, round_sites(present, weights, nearest_codes(job.choices), {}), job.choices)

        kept = stored(job.anatomy, job.resolution.at(CACHE).get(f"blocks.{block}.cache"), block) if cached else None

        def bind(weights: Weights, inputs: Change) -> Bound:
            return bound(runner, runner.bind(block, weights, states, inputs=inputs), self.inside(block), kept)

        known = {} if job.trained else self.readings  # a static step is no longer that of channels that move
        readings = {**self.readings, **stand_ins(job.resolution.inputs, known)}
        return Objective(states, self.target, bind, rounded, changes(sites, readings, True), self.teacher)

    def inside(self, block: int) -> dict[str, Reading]:
        """How what no matrix reads is read in a block: `keys` → its reading."""
        return words(inner_of(self.job.anatomy, self.job.resolution.inputs, block), self.readings)

    def learn(self, block: int, looked: Looked, before: Moved, staging: Staging | None, clock: Clock) -> Learnt | None:
        """Trains what is learnt in a block, with all else in it rounded; None where nothing is. `before` is the block
        before the transforms of its taps: sites that read a learnt one begin there."""
        moved, stats, job = looked.moved, looked.stats, self.job
        sites = [site for site in job.sites(block) if f"{site.name}.weight" in moved.exact]
        taught = {site.name: job.learnt[site.name] for site in sites if site.name in job.learnt}
        steps = learnt_readings(sites, static_taps(job.resolution.inputs), self.readings)
        if job.settings.scope == MODEL or not (taught or steps):
            return None
        plain, taps = (
            self.round([s for s in sites if s.name not in taught], moved, stats),
            learnt_taps(sites, job, self.transforms),
        )
        weights = effective(moved.stored, plain, job.choices)
        weights |= {f"{name}.weight": moved.exact[f"{name}.weight"] for name in taught}
        turned = [name for one in taps if one.maker is not None for name in one.sites]
        weights |= {f"{name}.weight": before.exact[f"{name}.weight"] for name in turned}
        formats = {name: job.format(name) for name in taught}
        seen, objective = {name: stats.get(name, {}) for name in taught}, self.objective(block, moved, cached=True)
        lesson = Lesson(block, taught, formats, weights, seen, job.seed, taps, steps, learnt_streams(job, block))
        if job.settings.loss == DISTRIBUTION:
            objective = objective.corrected(moved.exact, self.running()[0].attending)
        return learn(lesson, objective, job.settings, staging, clock)

    def begin(self, outer: Weights, exact: Weights | None = None, rows: Mapping[str, Rows] | None = None) -> None:
        """States behind the embeddings.

        Args:
            outer: the compressed model's tensors; `exact`: the teacher's, where one is asked for.
            rows: what makes the rows of a compressed table, in place of its tensor.
        """
        if self.runner is None:
            return
        self.states = self.runner.begin(self.batches, outer, rows=rows)
        if self.job.taught and exact is not None:
            self.teacher = self.states.with_hidden(self.runner.begin(self.batches, exact).hidden)

    def advance(self, block: int, weights: Weights, sample: Sequence[Site] = ()) -> dict[str, Stats]:
        """Runs the compressed block for the next states; keeps rows of the inputs of some sites on the way."""
        runner, states = self.running()
        found = collection(sample, {site.name: frozenset() for site in sample}, sample=True)
        inputs = changes(self.job.sites(block), self.readings)
        bind = lambda: runner.block(block, weights, states, watch=self._watch(found), inputs=inputs)  # noqa: E731  # as above
        self.states = run(runner, bind, self.inside(block))
        if self.target is not None:
            self.teacher, self.target = self.target, None
        return found.finish(sample)[0]

    def round(
        self, sites: Sequence[Site], moved: Moved, stats: Mapping[str, Stats], learnt: Finished | None = None
    ) -> dict[str, Codes]:
        """Codes of the sites whose weight is there; `learnt` holds the formats and codes that were."""
        present = [site for site in sites if f"{site.name}.weight" in moved.exact]
        codes = round_sites(present, moved.exact, self.job.choices, stats, learnt, self.job.at_once)
        for seen in stats.values():
            if "hessian" in seen:
                forget(seen["hessian"])  # a factor is as large, and what comes next needs room
        return codes

    def built(self, moved: Moved, codes: Mapping[str, Codes]) -> Weights:
        """What the compressed block computes with, in the dtype of the work."""
        return effective(moved.stored, codes, self.job.choices, self.job.working)

    def tables(self, codes: Mapping[str, Codes]) -> dict[str, Rows]:
        """What makes the rows of an embedding that is rounded row by row, in the dtype of the work: none is rebuilt."""
        found: dict[str, Rows] = {}
        for name in codes.keys() & {"embed"}:
            own, fmt = codes[name], self.job.format(name)
            if alone(fmt, (own.codes_OI.shape[0], own.codes_OI.shape[1])) and not own.terms:
                found[name] = lambda which, own=own, fmt=fmt: fmt.decode(of_rows(own, which)).to(self.job.working)  # type: ignore[misc]  # the defaults bind the loop's variables
        return found

    def see_head(self, outer: Weights) -> tuple[dict[str, Stats], dict[str, str]]:
        """Statistics of what the head reads, where its parts need them."""
        job = self.job
        sites = [site for site in job.sites(None) if site.name in job.needs]
        if not sites:
            return {}, {}
        found = collection(sites, job.needs, sample=True)
        runner, states = self.running()
        for _ in runner.tail(outer, states, watch=found.watch):
            pass
        return found.finish(sites)

    def running(self) -> tuple[Runner, States]:
        """The runner and the states."""
        assert self.runner is not None, "a plan that needs text runs with text"
        assert self.states is not None, "begin comes first"
        return self.runner, self.states
