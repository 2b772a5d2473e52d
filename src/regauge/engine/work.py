"""The work on blocks, without files: read, move, see, round, run. The driver and the search for strengths share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from regauge.anatomy import moves as algebra
from regauge.anatomy.model import Site, Weights
from regauge.anatomy.moves import Move
from regauge.engine.block import Moved, activation_grids, as_stored, round_sites
from regauge.engine.job import Job
from regauge.engine.statistics import collection
from regauge.formats.base import Codes
from regauge.hosts.base import Runner
from regauge.hosts.states import States
from regauge.rounding.base import Stats
from regauge.text.calibration import Calibration

BATCH = 4096  # tokens a batch


class Pass:
    """A job streamed through one block after another.

    Attributes:
        states: what the compressed model has made of the text so far; None where no text is needed.
    """

    def __init__(self, job: Job, windows: Calibration | None, runner: Runner | None = None) -> None:
        self.job = job
        self.batches = windows.batches(BATCH) if windows is not None else []
        self.runner = runner
        if windows is not None and runner is None:
            self.runner = job.host.runner(job.source, anatomy=job.anatomy)
        self.states: States | None = None

    def read(self, block: int | None) -> Moved:
        """The tensors of a block, after the moves of the whole model."""
        job = self.job
        source = job.source.block(block)
        if job.source.anatomy.tied and block is None:
            source.pop("head.weight", None)
        if not job.moves:
            return Moved(source, source, source, ())
        exact = algebra.apply(job.moves, job.source.anatomy, source, dtype=torch.float64)
        return self._moved(source, exact, job.moves)

    def _moved(self, source: Weights, exact: Weights, moves: Sequence[Move]) -> Moved:
        stored = as_stored(self.job.anatomy, exact, source, self.job.source.dtype)
        return Moved(source, exact, stored, tuple(moves))

    def local(self, block: int, moved: Moved) -> tuple[Moved, list[str], dict[str, str]]:
        """The block after the rewrites that work block by block, what they noted, and sites of rare experts."""
        job, notes = self.job, list[str]()
        rare: dict[str, str] = {}
        for recast in job.local:
            stats: dict[str, Stats] = {}
            if recast.rewrite.needs:
                needs = {site.name: recast.rewrite.needs for site in job.sites(block) if site.tap is not None}
                stats, rare = self.see(block, moved.exact, needs)
            anatomy, made = recast.rewrite(job.anatomy, moved.exact, stats, None, block)
            notes += [note for note in anatomy.notes if note not in job.anatomy.notes]
            exact = algebra.apply(made, job.anatomy, moved.exact, dtype=torch.float64)
            moved = self._moved(moved.source, exact, (*moved.moves, *made))
        return moved, notes, rare

    def see(
        self, block: int, weights: Weights, needs: Mapping[str, frozenset[str]], sample: bool = False
    ) -> tuple[dict[str, Stats], dict[str, str]]:
        """Statistics of a block's inputs under some weights, and the sites whose expert was rare."""
        sites = self.job.sites(block)
        found = collection(sites, needs, sample)
        runner, states = self.running()
        if found.watch:
            run = runner.bind(block, weights, states, watch=found.watch)
            for batch, hidden in enumerate(states.hidden):
                run(hidden, batch)
        return found.finish(sites)

    def begin(self, outer: Weights) -> None:
        """States behind the embeddings."""
        if self.runner is None:
            return
        self.states = self.runner.begin(self.batches, outer)

    def advance(self, block: int, weights: Weights, sample: Sequence[Site] = ()) -> dict[str, Stats]:
        """Runs the compressed block for the next states; keeps rows of the inputs of some sites on the way."""
        runner, states = self.running()
        found = collection(sample, {site.name: frozenset() for site in sample}, sample=True)
        inputs = activation_grids(self.job.sites(block), self.job.resolution.inputs)
        self.states = runner.block(block, weights, states, watch=found.watch, inputs=inputs)
        return found.finish(sample)[0]

    def round(self, sites: Sequence[Site], moved: Moved, stats: Mapping[str, Stats]) -> dict[str, Codes]:
        """Codes of the sites whose weight is there."""
        present = [site for site in sites if f"{site.name}.weight" in moved.exact]
        return round_sites(present, moved.exact, self.job.choices, stats)

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
        """The runner and the states, which are there once text is read."""
        assert self.runner is not None, "a plan that needs text runs with text"
        assert self.states is not None, "begin comes first"
        return self.runner, self.states
