"""What a job would do, before it does it: `--dry-run`, and the checks of disk and time at the start of a run.

Bytes are computed from formats, seconds estimated (see `duration`). Nothing here is a measurement of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from regauge import parts
from regauge.artifact.disk import free_bytes
from regauge.artifact.receipt import StoreReceipt, TapReceipt
from regauge.engine import learning_cost
from regauge.engine.block import spelled, store_receipts, tap_receipts
from regauge.engine.duration import seconds, speed
from regauge.engine.job import Job, waits
from regauge.engine.reading import Reading
from regauge.engine.room import room
from regauge.engine.shaping import MEASURED
from regauge.parts import CACHE
from regauge.plan import digest
from regauge.plan.keeping import growth


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SitePlan(_Record):
    """What a site would get. Bytes before count bf16; `kept` and `fallback` say why."""

    name: str
    kind: str
    shape: tuple[int, int]
    choice: dict[str, object] | None
    bytes_before: int
    bytes_after: int
    kept: str | None = None
    fallback: str | None = None


class DryRun(_Record):
    """What `apply` would do. Where `refusals` is not empty it would refuse, for all of these reasons.

    Attributes:
        passes: how often the model is streamed, and for what.
        seconds: estimate of the time, or None where the job cannot be made.
        disk_needed: bytes while it works; disk_free: bytes free where OUT will lie.
        memory_needed: anonymous bytes at the highest.
        cache_bytes: of another token of a long text in the source's cache, over all blocks, as bf16.
        wire_refusals: why the artifact is not compressed-tensors.
        kl, stays: predicted: KL to the original in nats a token between these, and how many of 100 next tokens are the
            same; None where nothing is predicted.
        quality: what that is predicted from, or why it is not predicted, as a sentence.
    """

    plan: str
    plan_hash: str
    source: str
    family: str
    wire: str = ""
    wire_refusals: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    sites: tuple[SitePlan, ...] = ()
    taps: tuple[TapReceipt, ...] = ()
    caches: tuple[StoreReceipt, ...] = ()
    cache_bytes: float = 0.0
    notes: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    calibration: dict[str, object] = {}
    bytes_bf16: int = 0
    bytes_after: int = 0
    ratio: float = 0.0
    seconds: float | None = None
    disk_needed: int = 0
    disk_free: int = 0
    memory_needed: int = 0
    kl: tuple[float, float] | None = None
    stays: float | None = None
    quality: str = ""


def site_plans(job: Job) -> list[SitePlan]:
    """Every site with what it would get."""
    out = []
    shapes = {site.name: site.shape for site in job.source.anatomy.sites}
    for site in job.anatomy.sites:
        choice = job.choices[site.name]
        tied = site.name == "head" and job.anatomy.tied
        bias = site.shape[0] * job.source.dtype.itemsize if site.bias is not None else 0
        count = site.shape[0] * site.shape[1]
        after = count * job.source.dtype.itemsize if choice is None else parts.bytes_of(choice, site.shape)
        known = not tied
        rows, columns = shapes[site.name]
        out.append(
            SitePlan(
                name=site.name,
                kind=site.kind,
                shape=site.shape,
                choice=None if choice is None else spelled(choice),
                bytes_before=known * (2 * rows * columns + (2 * rows if site.bias is not None else 0)),
                bytes_after=known * (after + bias),
                kept=job.resolution.kept.get(site.name),
                fallback=job.resolution.fallbacks.get(site.name),
            )
        )
    return out


def other_bytes(job: Job) -> int:
    """Bytes of what is no site: norms, and what stays as it is."""
    norms = sum(n.size * len(n.slots) for n in job.anatomy.norms)
    described = sum(
        s.shape[0] * s.shape[1] + (s.shape[0] if s.bias is not None else 0) for s in job.source.anatomy.sites
    )
    if job.source.anatomy.tied:
        head = job.source.anatomy.site("head").shape
        described -= head[0] * head[1]
    own = sum(n.size * len(n.slots) for n in job.source.anatomy.norms)
    outside = job.source.parameters() - described - own
    return (norms + max(outside, 0)) * job.source.dtype.itemsize


def bytes_after(job: Job) -> int:
    """Bytes of the artifact's tensors, from formats."""
    return sum(plan.bytes_after for plan in site_plans(job)) + other_bytes(job)


def passes(job: Job, read: Reading, flop: float | None = None) -> list[str]:
    """How often the model is streamed, and for what; `flop` is the machine's speed, where costs are to be told."""
    if not job.calibrated:
        told = ["one pass over the weights, tensor by tensor; no text is read and nothing is run"]
    else:
        told = []
        if read.sampled is not None:
            told.append(f"the model samples {read.sampled[0]} windows of {read.sampled[1]} tokens from itself")
        told += [f"one pass for the statistics that {recast.name} needs" for recast in job.recasts if waits(recast)]
        for recast in job.recasts:
            points = 1
            for grid in recast.rewrite.search.values():
                points *= len(grid)
            if recast.rewrite.search:
                told.append(f"{points + 1} passes on a part of the text to search {', '.join(recast.rewrite.search)}")
        if job.shaping is not None:
            told += ["one pass of the original for the scores of every unit"] * job.shaping.waiting
            told.append(
                f"in the pass below, each of {len(job.shaping.blocks(job.whole))} blocks is run once more to see which "
                f"units matter, and twice on at most {MEASURED:,} tokens to measure what it takes units out of"
            )
        seen = sum(1 for recast in job.local if recast.rewrite.needs) + bool(job.needs)
        told.append(f"one pass that runs each block {seen + 1} times: to see what it reads, and compressed")
        told += learning_cost.told(job, read.tokens, flop)
    if job.certified:
        told.append("alongside, certificates of the moves in float64 on two dozen tokens")
    return told


def disk_needed(job: Job, read: Reading) -> int:
    """Bytes on disk while the job works: the artifact and two generations of states, the teacher's too where it is."""
    tokens = read.tokens
    states = tokens * job.anatomy.hidden * job.working.itemsize
    ends = [site.shape[0] * site.shape[1] for site in job.whole.in_block(None)] if job.moves else []
    moved = (8 + 2) * sum(ends)  # embedding and head in float64 and as stored, while they are written
    return int(bytes_after(job) * 1.02) + (6 if job.taught else 3) * states + moved + (4 << 20)


def record(
    job: Job, read: Reading, source: str, out: Path | None, refusals: Sequence[str] = (), timed: bool = True
) -> DryRun:
    """The dry run of a job."""
    sites = site_plans(job)
    after = bytes_after(job)
    before = job.source.bytes_bf16()
    tokens = read.tokens
    notes = [*job.resolution.notes, *read.notes]
    if job.shaping is not None and job.shaping.waiting:
        notes.append("how many units stay in which block is decided after scores are seen; an even cut is counted here")
    return DryRun(
        plan=job.plan.name,
        plan_hash=digest(job.plan),
        source=source,
        family=job.source.anatomy.family,
        wire=job.wire.name,
        wire_refusals=job.refusals,
        refusals=tuple(refusals),
        sites=tuple(sites),
        taps=tuple(tap_receipts(job.anatomy, job.resolution.inputs)),
        caches=store_receipts(job.anatomy, job.resolution.at(CACHE)),
        cache_bytes=growth({}, job.anatomy).before,
        notes=tuple(dict.fromkeys(notes)),
        passes=tuple(passes(job, read, speed() if timed and job.learnt else None)),
        calibration=read.windows.record() if read.windows is not None else dict(read.identity),
        bytes_bf16=before,
        bytes_after=after,
        ratio=after / before if before else 0.0,
        seconds=seconds(job, tokens, read.sampled is not None) if timed else None,
        disk_needed=disk_needed(job, read),
        disk_free=free_bytes(out) if out is not None else 0,
        memory_needed=room(job, tokens).peak(),
    )
