"""`apply` and `dry_run`: one recipe on one model.

    receipt = apply("gptq-w4g128", "path/or/hub-id", "OUT", calibration="novels/")
    print(dry_run("gptq-w4g128", "path/or/hub-id").seconds)

OUT holds an ordinary transformers checkpoint with `regauge/recipe.yaml` and `regauge/receipt.json` in it. Two runs with
the same inputs give the same bytes, but for `regauge/run-log.json`: seconds, memory and machine of the run that ended.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regauge.artifact.config import CARRIED
from regauge.artifact.disk import check_disk
from regauge.artifact.ownership import refuse_out
from regauge.artifact.receipt import Receipt
from regauge.artifact.staging import Staging
from regauge.engine.driver import Drive
from regauge.engine.duration import course, seconds
from regauge.engine.enough import enough
from regauge.engine.estimate import DryRun, disk_needed, record
from regauge.engine.factoring import UNREAD, factored, planned, rewrite_of
from regauge.engine.foresight import Foresight, foresee
from regauge.engine.forming import formed
from regauge.engine.job import Job, plan_of, prepare
from regauge.engine.ranking import ranking
from regauge.engine.reading import Reading, reading, sampled
from regauge.engine.receipts import Done, command_line, files_of, log_of, receipt_of, versions
from regauge.engine.refusals import Refusals
from regauge.engine.room import room
from regauge.engine.strengths import settle
from regauge.engine.watchdog import Clock, PeakMemory, Watcher, nobody, quiet_torch
from regauge.engine.whole import whole
from regauge.errors import BudgetError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.plan import Plan, digest
from regauge.plan.caches import Asked, with_cache
from regauge.plan.outer import with_outer
from regauge.text.corpora import Where


@dataclass(frozen=True)
class Reads:
    """What a job is given to read, and how it is laid out: what the user says beside recipe and model."""

    calibration: Where | None = None
    tokens: int | None = None
    length: int | None = None
    seed: int = 0
    wire: str | None = None


@dataclass(frozen=True, eq=False)
class _Ready:
    """A job with its text, after every refusal was looked for."""

    job: Job | None
    read: Reading | None
    refusals: Refusals


def apply(
    recipe: str | Path | Plan,
    model: str | Path,
    out: str | Path,
    *,
    calibration: Where | None = None,
    tokens: int | None = None,
    length: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    force: bool = False,
    time_limit: float | None = None,
    max_memory: int | None = None,
    progress: Watcher | None = None,
    wire: str | None = None,
    embed: str | None = None,
    head: str | None = None,
    cache: Asked | None = None,
    command: str = "",
) -> Receipt:
    """Compresses a model as a recipe says and writes the artifact to OUT.

    Args:
        recipe: a preset's name, a recipe file, or a plan.
        model: a transformers directory or hub id; safetensors only.
        out: the directory to make. It must not exist, unless `force`.
        calibration: text (see `texts.py`), images as .npz, or None: the model samples its own where the recipe reads
            text.
        tokens, length: how much is read, in windows of which length; the recipe says where the user does not.
        time_limit: seconds. Refuses up front, or stops where it can go on later, when it will not suffice.
        max_memory: bytes that the process may take at its highest; fewer matrices are rounded at once then.
        progress: is called with `Progress` events.
        wire: `compressed-tensors` or `regauge`; None takes the first that can say the recipe.
        embed, head: their formats, `int8` or `int6-g64`, or `full`; None: as the recipe says.
        cache: what the artifact keeps of the past when it is loaded, as `load` takes it; None: as the recipe says.
        command: what the user typed, for the run log.

    Raises:
        RegaugeError: any refusal, all of them at once and before any work; what was finished stays for the next run.
    """
    clock, out = Clock(progress or nobody, time_limit), Path(out).expanduser().absolute()
    with quiet_torch(), PeakMemory() as memory:
        clock.say("open")
        source = host_of(model).open(model, revision)
        plan = with_cache(with_outer(plan_of(recipe), embed, head), cache)
        if rewrite_of(plan) is not None:
            refuse_out(out, force, CARRIED)
        with factored(plan, source, out, (calibration, tokens, length), seed, clock) as made:
            ready = _ready(plan, made.source, Reads(calibration, tokens, length, seed, wire))
            ready.refusals.attempt(lambda: refuse_out(out, force, CARRIED), None)
            ready.refusals.settle()
            job, read = ready.job, ready.read
            assert job is not None and read is not None, "nothing was refused"  # noqa: PT018  # not a test
            check_disk(out, disk_needed(job, read))
            _in_time(job, read, clock)
            job = replace(job, at_once=room(job, read.tokens).at_once(max_memory))
            identity = _identity(job, read) | made.identity
            clock.ahead(course(job, read.tokens, read.sampled is not None))
            with Staging(out, identity, force=force) as staging, _threads(staging):
                job, receipt = _run(job, read, staging, clock, str(model), str(identity["source"]))
                receipt = made.told(receipt)
                log = log_of(clock, memory, command or command_line())
                final = receipt.model_copy(update=log)
                staging.finish(files_of(job, receipt, log, staging))
        clock.say("finish", f"{out} is written")
    return final


def dry_run(
    recipe: str | Path | Plan,
    model: str | Path,
    out: str | Path | None = None,
    *,
    calibration: Where | None = None,
    tokens: int | None = None,
    length: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    force: bool = False,
    wire: str | None = None,
    max_memory: int | None = None,
    embed: str | None = None,
    head: str | None = None,
    cache: Asked | None = None,
) -> DryRun:
    """What `apply` would do with the same arguments: each site, bytes, passes, time and disk, and every refusal.

    Raises:
        ModelError, RecipeError: the model cannot be opened or the recipe not read; there is nothing to say then.
    """
    with quiet_torch():
        plan = with_cache(with_outer(plan_of(recipe), embed, head), cache)
        source = planned(plan, host_of(model).open(model, revision))
        ready = _ready(plan, source, Reads(calibration, tokens, length, seed, wire))
        target = None if out is None else Path(out).expanduser()
        if target is not None:
            ready.refusals.attempt(lambda: refuse_out(target, force, CARRIED), None)
        if ready.job is not None and ready.read is not None:
            needed = room(ready.job, ready.read.tokens)
            ready.refusals.attempt(lambda: needed.at_once(max_memory), 0)
        told = [str(error) for error in ready.refusals.errors]
        if ready.job is None:
            return DryRun(
                plan=plan.name,
                plan_hash=digest(plan),
                source=str(model),
                family=source.anatomy.family,
                refusals=tuple(told),
                bytes_bf16=source.bytes_bf16(),
            )
        read = ready.read or Reading(None, None, {"kind": "none"})
        found = record(ready.job, read, str(model), target, told)
        unread = "the run would be refused" if told else UNREAD if rewrite_of(plan) is not None else ""
        seen = Foresight.nothing(unread) if unread else foresee(ready.job, read)
        known = {"kl": (seen.low, seen.high), "stays": seen.stays} if not seen.why else {}
        found = found.model_copy(update={**known, "quality": str(seen)})
        if target is not None and found.disk_needed > found.disk_free:
            why = f"{target} needs {found.disk_needed:,} bytes and its disk has {found.disk_free:,} free."
            found = found.model_copy(update={"refusals": (*found.refusals, why)})
        return found


def _ready(plan: Plan, source: Source, given: Reads) -> _Ready:
    refusals = Refusals()
    job = prepare(plan, source, given.wire, given.seed, refusals)
    read = None
    if job is not None:
        made = job
        read = refusals.attempt(lambda: reading(made, given.calibration, given.tokens, given.length), None)
    return _Ready(job, read, refusals)


def _in_time(job: Job, read: Reading, clock: Clock) -> None:
    if clock.limit is None:
        return
    needed = seconds(job, read.tokens, read.sampled is not None)
    if needed > 3 * clock.limit:  # an estimate may be off by this much; the clock stops the run where it was right
        raise BudgetError(
            f"the time limit is {clock.limit:.0f} s and this job is estimated at {needed:.0f} s; give more time, or "
            "fewer --tokens."
        )


def _threads(staging: Staging) -> Any:
    """A resumed run computes with as many threads as the run that began: sums depend on them."""
    known = staging.notes.get("threads")
    if known is None:
        staging.note("threads", torch.get_num_threads())
    return quiet_torch(known if isinstance(known, int) else None)


def _identity(job: Job, read: Reading) -> dict[str, Any]:
    return {
        "plan": digest(job.plan),
        "calibration": read.identity,
        "seed": job.seed,
        "working": str(job.working).removeprefix("torch."),
        "wire": job.wire.name,
        "versions": versions(),
    }


def _run(job: Job, read: Reading, staging: Staging, clock: Clock, source: str, source_hash: str) -> tuple[Job, Receipt]:
    """The work, and the job as it was carried out, with every choice made."""
    windows = sampled(job, read, staging, clock)
    windows = windows if read.fixed else enough(job, windows, staging, clock)
    job, searched = settle(job, windows, staging, clock)
    job, attended = formed(job, windows, staging, clock)
    job, taught = whole(job, windows, staging, clock)
    drive = Drive(job, windows, staging, clock)
    logits_error = drive.run()
    sites, moves, selects, notes = drive.receipts()
    job, how = ranking(job, drive.influences())
    told = [*notes, *read.notes, *attended, *how]
    done = Done(job, windows, sites, moves, selects, told, searched, logits_error, (*taught, *drive.learnt()))
    metadata: Any = staging.index()["metadata"]
    return job, receipt_of(done, source, source_hash, int(metadata["total_size"]))
