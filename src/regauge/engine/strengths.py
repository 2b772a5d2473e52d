"""Choices that are global, made before the streaming pass: strengths searched by the loss of the whole model, and
rewrites of the whole model that want statistics of every site first.

The loss is the mean KL divergence of the compressed model's next-token distribution from the original's on the
calibration text (models without a head: the relative squared error of their output). Lower = better. It is taken on at
most `TOKENS` tokens, with every site rounded as the plan says: for SmoothQuant+ (2312.03788) errors that add up across
layers count, which a search layer by layer does not see.
Cost: one pass of the original, and one of rounding and running for each value of the grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.artifact.staging import Staging
from regauge.engine.block import changes, effective
from regauge.engine.job import Job, resized, waits
from regauge.engine.shaping import allot, needs_of, scores_of
from regauge.engine.statistics import collection
from regauge.engine.taps import settle as settle_taps
from regauge.engine.watchdog import Clock
from regauge.engine.work import BATCH, Pass
from regauge.errors import RecipeError
from regauge.hosts.base import Runner
from regauge.hosts.states import States
from regauge.rewrites.base import fixed
from regauge.rounding.base import Stats
from regauge.text.calibration import Calibration

ALLOTTED = "units kept"
TOKENS = 4096  # of the text, for each value of a grid


@dataclass(frozen=True, eq=False)
class Original:
    """The original model's final states on the text, from which its outputs are made again batch by batch."""

    runner: Runner
    states: States
    outer: Mapping[str, Tensor]

    @staticmethod
    def of(job: Job, batches: list[Tensor]) -> Original:
        runner = job.host.runner(job.source)
        outer = job.source.block(None)
        states = runner.begin(batches, outer)
        for block in range(job.anatomy.blocks):
            states = runner.block(block, job.source.block(block), states)
        return Original(runner, states, outer)


def settle(
    job: Job, windows: Calibration | None, staging: Staging, clock: Clock
) -> tuple[Job, list[dict[str, object]]]:
    """The job with every global choice made, and what was searched. A resumed run finds what an earlier one chose."""
    if windows is None:
        return job, []
    if job.shaping is not None and job.shaping.waiting:
        job = _allotted(job, windows, staging, clock)
    if any(map(waits, job.recasts)):
        job = _surveyed(job, windows, clock)
    searched: list[dict[str, object]] = []
    for index, recast in enumerate(job.recasts):
        if recast.rewrite.search:
            job, told = _searched(job, index, windows, staging, clock)
            searched.append(told)
    return job, searched


def whole_loss(job: Job, original: Original, windows: Calibration, runner: Runner | None = None) -> float:
    """Loss of the model compressed as the job says, against the original."""
    work = Pass(job, windows, runner)
    outer = work.read(None)
    sites = job.sites(None)
    early = [site for site in sites if site.name != "head"]
    codes = work.round(early, outer, {})
    running = effective(outer.stored, codes, job.choices)
    work.begin(running, outer.exact)
    for block in range(job.anatomy.blocks):
        moved, *_ = work.prune(block, work.local(block, work.read(block))[0])
        looked = work.look(block, moved)
        codes = work.round(job.sites(block), looked.moved, looked.stats)
        work.advance(block, effective(looked.moved.stored, codes, job.choices))
    head_stats, _ = work.see_head(running)
    head = [site for site in sites if site.name == "head"]
    running |= effective(outer.stored, work.round(head, outer, head_stats), job.choices)
    runner, states = work.running()
    inputs = changes(sites, work.readings | settle_taps(sites, job.resolution.inputs, {}, head_stats, {}))
    found = runner.tail(running, states, inputs=inputs)
    return _divergence(original, found, "head" in {site.name for site in sites})


def _divergence(original: Original, found: Iterator[Tensor], head: bool) -> float:
    total, weight = 0.0, 0.0
    expected = original.runner.tail(dict(original.outer), original.states)
    for want, got in zip(expected, found, strict=True):
        if head:
            log_p, log_q = (torch.log_softmax(t.float().flatten(0, -2), dim=-1) for t in (want, got))
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            weight += len(log_p)
        else:
            total += float((want - got).float().square().sum(dtype=torch.float64))
            weight += float(want.float().square().sum(dtype=torch.float64))
    return total / weight if weight else 0.0


def _searched(
    job: Job, index: int, windows: Calibration, staging: Staging, clock: Clock
) -> tuple[Job, dict[str, object]]:
    recast = job.recasts[index]
    key = f"search {index}"
    options = list(recast.rewrite.search)
    points = [dict(zip(options, values, strict=True)) for values in itertools.product(*recast.rewrite.search.values())]
    told = staging.notes.get(key)
    losses: list[float] = list(told["losses"]) if isinstance(told, dict) else []
    if len(losses) < len(points):
        few = replace(windows, inputs=windows.inputs[: max(1, -(-TOKENS // windows.inputs[0].numel()))])
        original = Original.of(job, few.batches(BATCH))
        runner = job.host.runner(job.source, anatomy=job.anatomy)
        clock.start(f"search of {recast.name}", len(points), len(losses))
        for point in points[len(losses) :]:
            losses.append(whole_loss(_set(job, index, point), original, few, runner))
            staging.note(key, {"losses": losses})
            clock.tick(f"search of {recast.name}", len(losses), len(points))
    best = min(range(len(points)), key=lambda i: losses[i])
    entry: dict[str, object] = {
        "rewrite": recast.name,
        "chosen": points[best],
        "loss": losses[best],
        "grid": [{**point, "loss": loss} for point, loss in zip(points, losses, strict=True)],
    }
    return _set(job, index, points[best]), entry


def _set(job: Job, index: int, point: Mapping[str, float]) -> Job:
    recasts = list(job.recasts)
    recasts[index] = replace(recasts[index], rewrite=fixed(recasts[index].rewrite, **point))
    return replace(job, recasts=tuple(recasts))


def _surveyed(job: Job, windows: Calibration, clock: Clock) -> Job:
    """The job after the rewrites that wanted statistics of every site, taken on the original in its present gauge."""
    for index, recast in enumerate(job.recasts):
        if not waits(recast):
            continue
        stats = _survey(job.unpruned, recast.rewrite.needs, windows, clock)
        anatomy, moves = recast.rewrite(job.whole, {}, stats, None, None)
        if anatomy.slots(None).keys() != job.whole.slots(None).keys():
            raise RecipeError(f"rewrite {recast.name!r} changes which tensors there are after it has seen statistics")
        recasts = list(job.recasts)
        recasts[index] = replace(recast, moves=tuple(moves))
        job = replace(job.moved_to(anatomy), recasts=tuple(recasts))
    return job


def _allotted(job: Job, windows: Calibration, staging: Staging, clock: Clock) -> Job:
    """The job with the sizes that scores decide, taken on the original model."""
    assert job.shaping is not None, "something waits for scores"
    kept = staging.notes.get(ALLOTTED)
    if not isinstance(kept, dict):
        plain, shaping = job.unpruned, job.shaping
        work = Pass(plain, windows)
        work.begin(work.read(None).stored)
        scores: dict[str, Tensor] = {}
        clock.start("scores", plain.anatomy.blocks)
        for block in range(plain.anatomy.blocks):
            moved, cuts = work.read(block), shaping.in_block(plain.anatomy, block)
            stats, _ = work.see(block, moved.exact, needs_of(plain.anatomy, cuts, repair=False))
            scores |= scores_of(plain.anatomy, cuts, moved.exact, stats)
            runner, states = work.running()
            work.states = runner.block(block, moved.stored, states)
            clock.tick("scores", block + 1, plain.anatomy.blocks)
        kept = allot(shaping.cuts, plain.anatomy, scores)
        staging.note(ALLOTTED, kept)
    return resized(job, {str(name): int(str(count)) for name, count in kept.items()})


def _survey(job: Job, needs: frozenset[str], windows: Calibration, clock: Clock) -> dict[str, Stats]:
    if "hessian" in needs:
        raise RecipeError("a rewrite of the whole model cannot have XᵀX of every site: it would not fit in memory")
    work = Pass(job, windows)
    outer = work.read(None)
    work.begin(outer.stored)
    stats: dict[str, Stats] = {}
    clock.start("survey", job.anatomy.blocks)
    for block in range(job.anatomy.blocks):
        weights = work.read(block).exact
        sites = job.sites(block)
        found = collection(sites, {site.name: needs for site in sites})
        runner, states = work.running()
        work.states = runner.block(block, weights, states, watch=found.watch)
        stats |= found.finish(sites)[0]
        clock.tick("survey", block + 1, job.anatomy.blocks)
    sites = [site for site in job.sites(None) if site.name == "head"]
    found = collection(sites, {site.name: needs for site in sites})
    runner, states = work.running()
    for _ in runner.tail(outer.stored, states, watch=found.watch):
        pass
    return stats | found.finish(sites)[0]
