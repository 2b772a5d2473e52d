"""The driver: streams a model through a plan, block by block, into a staged artifact.

For each block: read its tensors, move them, certify, run it to see what is needed, round, run the compressed block for
the next states, write the shard. A plan that needs no text runs nothing and works tensor by tensor. Every finished
block is committed with its figures and the states behind it, so a run that was killed goes on there and ends with the
same bytes. Peak memory: one block, its statistics and the states (mapped files where they are large).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from regauge.anatomy.model import Site, Weights
from regauge.anatomy.storage import outer_names
from regauge.artifact.codec.taps import written
from regauge.artifact.receipt import MoveReceipt, SelectReceipt, SiteReceipt
from regauge.artifact.staging import STATES, Staging
from regauge.elastic.family import unranked
from regauge.engine.block import Moved, full_precision, site_receipts
from regauge.engine.certify import Prover
from regauge.engine.inner import inner_of
from regauge.engine.job import Job
from regauge.engine.learning import Learnt, room
from regauge.engine.ranking import influence
from regauge.engine.renorming import anew
from regauge.engine.taps import settle
from regauge.engine.watchdog import Clock
from regauge.engine.work import Pass
from regauge.formats.base import Codes
from regauge.hosts.states import SPILL, Spill, States
from regauge.kernels.cpu.machine import trim
from regauge.rounding.base import Stats
from regauge.text.calibration import Calibration


@dataclass(frozen=True, eq=False)
class Done:
    """What was done to the tensors of one shard.

    Attributes:
        rare: site → what was done about an expert that saw few tokens.
        proof: certificates of its moves; selects: what was taken out, as measured.
        logits_error: of the whole model, in the last shard.
        learnt: what was trained in the block, and how far it came.
        influence: how much the block turns the states, where blocks are ranked by it.
    """

    sites: Sequence[Site]
    moved: Moved
    codes: Mapping[str, Codes]
    stats: Mapping[str, Stats] = field(default_factory=dict)
    rare: Mapping[str, str] = field(default_factory=dict)
    proof: Sequence[MoveReceipt] = ()
    notes: Sequence[str] = ()
    logits_error: float | None = None
    selects: Sequence[SelectReceipt] = ()
    learnt: Mapping[str, object] | None = None
    influence: float | None = None


class Drive:
    """One run into a staged output: what `Pass` does, committed shard by shard."""

    def __init__(self, job: Job, windows: Calibration | None, staging: Staging, clock: Clock) -> None:
        self.job, self.staging, self.clock = job, staging, clock
        (staging.root / STATES).mkdir(parents=True, exist_ok=True)
        self.work = Pass(job, windows, store=Spill(staging.root / STATES))
        self.prover = Prover(job) if job.certified else None
        total = job.anatomy.blocks + 2
        self.shards = [job.wire.shard(index, total) for index in range(total)]

    def run(self) -> float | None:
        """Every shard that is not there yet; the error of the whole model's logits, where moves are certified."""
        finished = self._finished()
        if finished == len(self.shards):  # killed while the output was being finished: nothing is left to compute
            last: Any = self.staging.notes[self.shards[-1]]
            return None if last["logits_error"] is None else float(last["logits_error"])
        if finished > 1:
            self.clock.say("blocks", f"resuming at block {finished} of {self.job.anatomy.blocks}")
        self.clock.start("blocks", self.job.anatomy.blocks, max(finished - 1, 0))
        before = self._embeddings(finished)
        for block in range(max(finished - 1, 0), self.job.anatomy.blocks):
            self._block(block)
            trim()  # or what a block's threads freed stays with them, a little more after each
            self.clock.tick("blocks", block + 1, self.job.anatomy.blocks)
        return self._tail(before)

    def receipts(self) -> tuple[list[SiteReceipt], list[MoveReceipt], list[SelectReceipt], list[str]]:
        """What every shard noted, in order."""
        sites, moves, selects, notes = [], [], [], []
        for shard in self.shards:
            note: Any = self.staging.notes[shard]
            sites += [SiteReceipt.model_validate(entry) for entry in note["sites"]]
            moves += [MoveReceipt.model_validate(entry) for entry in note["moves"]]
            selects += [SelectReceipt.model_validate(entry) for entry in note["selects"]]
            notes += note["notes"]
        return sites, moves, selects, list(dict.fromkeys(notes))

    def learnt(self) -> list[dict[str, object]]:
        """What was trained, a block each, in order."""
        notes: list[Any] = [self.staging.notes[shard] for shard in self.shards]
        return [dict(note["learnt"]) for note in notes if "learnt" in note]

    def influences(self) -> tuple[float, ...]:
        """How much each block turns the states; nothing where blocks are not ranked by it."""
        notes: list[Any] = [self.staging.notes[shard] for shard in self.shards]
        return tuple(float(note["influence"]) for note in notes if "influence" in note)

    def _finished(self) -> int:
        """How many shards are whole and can be gone on from. Without its states a block cannot be, so it is redone."""
        count = 0
        while count < len(self.shards) and self.staging.has(self.shards[count]):
            count += 1
        blocks = min(count - 1, self.job.anatomy.blocks)
        if count == len(self.shards):
            return count
        if blocks < 1 or not (self.work.runner or self.prover) or self.staging.kept(_behind(blocks)) is not None:
            return count
        return 1

    def _embeddings(self, finished: int) -> Weights:
        """Writes the embeddings' shard; begins the states. Returns the tensors that the compressed model runs with."""
        first, last = outer_names(self.job.anatomy)
        moved = self.work.read(None)
        sites = [site for site in self.job.sites(None) if f"{site.name}.weight" in first]
        head = _only(moved, first)
        codes = self._codes_of(0) if finished else self.work.round(sites, head, {})
        tables = self.work.tables(codes)
        rebuilt = {name: found for name, found in codes.items() if name not in tables}
        running = self.work.built(head, rebuilt) | _only(moved, last).stored
        blocks = min(finished - 1, self.job.anatomy.blocks)
        kept = self.staging.kept(_behind(blocks)) if blocks > 0 else None
        proof = self._prove(None, moved, kept)
        if not finished:
            self._write(0, Done(sites, head, codes, proof=proof, notes=self.job.anatomy.notes))
        self.work.begin(running, moved.exact, tables)
        if kept is not None:
            found = kept
            self._each(lambda name, states: states.with_hidden([found[f"{name}.{n}"] for n in range(len(states))]))
        self._spill()
        return running

    def _block(self, block: int) -> None:
        work, job, index = self.work, self.job, block + 1
        moved, notes, rare = work.local(block, work.read(block))
        proof = [] if job.trained else self._prove(block, moved, None)
        moved, selects, rarer = work.prune(block, moved)
        rare |= rarer
        sites = job.sites(block)
        looked = work.look(block, moved, sample=True)
        known = job.finished.get(block)
        learnt = Learnt(known, {}) if known else work.learn(block, looked, moved, self.staging, self.clock)
        if learnt is not None and learnt.finished.moved and not known:
            moved = work.moved(moved, learnt.finished.moves)
            looked = work.look(block, moved, sample=True, learnt=learnt.finished)
        if job.trained:
            proof = self._prove(block, moved, None)  # once all moves are there
        if learnt is not None:
            work.readings |= learnt.finished.readings
        moved, stats, proof = looked.moved, dict(looked.stats), [*proof, *looked.proof]
        rare |= looked.rare
        codes = work.round(sites, moved, stats, None if learnt is None else learnt.finished)
        if job.plan.statistics:
            moved, told = anew(work, block, moved, codes)
            notes = [*notes, *told]
        unseen = [site for site in sites if site.name in codes and site.name not in stats]
        before, turns = work.states, None
        further = job.reads_head or unranked(job.family) or index < job.anatomy.blocks
        if before is not None and (unseen or further):
            stats |= work.advance(block, work.built(moved, codes), unseen)
            turns = influence(before.hidden, work.running()[1].hidden) if unranked(job.family) else None
        self._keep(index)
        done = Done(sites, moved, codes, stats, rare, proof, notes, selects=selects, influence=turns)
        if learnt is not None:
            done = replace(done, notes=[*notes, *learnt.notes], learnt=learnt.told or None)
        self._write(index, done)
        self.staging.drop(_behind(block))
        if learnt is not None:
            self.staging.drop(room(block))

    def _tail(self, running: Weights) -> float | None:
        index = len(self.shards) - 1
        _, last = outer_names(self.job.anatomy)
        moved = self.work.read(None)
        error = self.prover.logits(moved) if self.prover is not None else None
        stats, rare = self.work.see_head(running)
        outer = self.job.sites(None)
        self.work.readings |= settle(outer, self.job.resolution.inputs, {}, stats, {})
        if None in self.job.finished:
            self.work.readings |= self.job.finished[None].readings
        tail = _only(moved, last)
        sites = [site for site in outer if f"{site.name}.weight" in last]
        codes = self.work.round(sites, tail, stats)
        self._write(index, Done(sites, tail, codes, stats, rare, logits_error=error))
        return error

    def _prove(self, block: int | None, moved: Moved, kept: Mapping[str, Tensor] | None) -> list[MoveReceipt]:
        if self.prover is None:
            return []
        if block is not None:
            return [self.prover.block(block, moved)]
        if kept is not None:
            self.prover.resume(moved, kept)
            return []
        return [self.prover.begin(moved)]

    def _keep(self, blocks: int) -> None:
        """The states behind so many blocks, for a run that goes on from here; none where they do not tell all."""
        if not all(states.alone for states in self._streams().values()):
            return
        kept = self.prover.keep() if self.prover is not None else {}
        for stream, states in self._streams().items():
            kept |= {f"{stream}.{n}": hidden for n, hidden in enumerate(states.hidden)}
        if kept:
            self.staging.keep(_behind(blocks), kept)

    def _streams(self) -> dict[str, States]:
        """The streams of states that there are."""
        found = {"hidden": self.work.states, "teacher": self.work.teacher}
        return {name: states for name, states in found.items() if states is not None}

    def _each(self, change: Callable[[str, States], States]) -> None:
        """Every stream of states by another in its place."""
        changed = {name: change(name, states) for name, states in self._streams().items()}
        self.work.states, self.work.teacher = changed.get("hidden"), changed.get("teacher")

    def _spill(self) -> None:
        if sum(h.numel() * h.element_size() for states in self._streams().values() for h in states.hidden) <= SPILL:
            return

        def spilt(name: str, states: States) -> States:
            folder = self.staging.root / STATES / name
            folder.mkdir(parents=True, exist_ok=True)
            return states.spill(folder)

        self._each(spilt)

    def _codes_of(self, index: int) -> dict[str, Codes]:
        """The codes in a shard written by an earlier run."""
        return self.job.wire.unpack(self.staging.read(self.shards[index]))[1]

    def _write(self, index: int, done: Done) -> None:
        """One shard with its figures, committed together."""
        job, codes = self.job, done.codes
        moved, layout = done.moved, job.wire.layout
        if layout.gone:
            moved = _only(moved, [name for name in moved.stored if layout.held(name)])
            done = replace(done, sites=[site for site in done.sites if layout.held(site.name)])
        figures = site_receipts(done.sites, moved, codes, done.stats, job.resolution, done.rare)
        tensors = job.wire.pack(full_precision(moved.stored, codes), codes)
        block = None if index in (0, len(self.shards) - 1) else index - 1
        inner = [] if block is None else inner_of(job.anatomy, job.resolution.inputs, block)
        last = len(self.shards) - 1
        read = done.sites if index != last else job.sites(None)  # a tied head's weights are not among its sites
        taps = dict.fromkeys(tap for tap in (*(site.tap for site in read), *inner) if tap in self.work.readings)
        tensors |= written({tap: self.work.readings[tap] for tap in taps if tap is not None})
        if index:
            tensors |= job.source.extras(None if index == last else index - 1)
        note = {
            "sites": [figure.model_dump(mode="json") for figure in figures],
            "moves": [receipt.model_dump(mode="json") for receipt in done.proof],
            "selects": [receipt.model_dump(mode="json") for receipt in done.selects],
            "notes": list(done.notes),
            "logits_error": done.logits_error,
        }
        note |= {} if done.learnt is None else {"learnt": dict(done.learnt)}
        note |= {} if done.influence is None else {"influence": done.influence}
        self.staging.write(self.shards[index], tensors, note=note)


def _behind(blocks: int) -> str:
    """Name of the states behind so many blocks."""
    return f"behind-{blocks}"


def _only(moved: Moved, names: Sequence[str]) -> Moved:
    """The same with some tensors only."""
    pick: Callable[[Weights], Weights] = lambda weights: {n: weights[n] for n in names if n in weights}  # noqa: E731  # three times the same line
    return replace(moved, source=pick(moved.source), exact=pick(moved.exact), stored=pick(moved.stored))
