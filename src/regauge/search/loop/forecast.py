"""How long a search will take and what it leaves on disk meanwhile, counted from the work it does.

Products at the rate of one that is timed now, in each dtype that is used; error feedback at the rate of a small matrix
that is rounded now, so much a column and so much a weight; the artifact as `apply` tells it. Within half as much again
of the truth on a machine that is as busy later as now.
Legend: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from regauge import parts
from regauge.engine import duration
from regauge.engine.job import prepare, quickest
from regauge.hosts.base import Source
from regauge.search.loop.desk import Effort
from regauge.search.losses.borders import state_bytes
from regauge.search.losses.fisher import narrowed
from regauge.search.losses.shelf import room
from regauge.search.losses.sites import ROWS
from regauge.search.options import SiteGroup, integer, plan_of

NEAR, MANY = 3.0, 8.0
"""Options of a site that are rounded whole: those that may win; those of a whole frontier."""
EDGE = 512
OUTSIDE = 8  # variants of embedding and head
COLUMN = 5e-5  # seconds a column of feedback on few rows, on some machine
SCORING = 2e-8  # seconds a logit: several passes over it


def work_folder(source: Source, groups: Sequence[SiteGroup], effort: Effort) -> int:
    """Bytes that a search takes on disk: what is rounded, an artifact that is made with the states of its own
    calibration, and the states at the borders, which are made again beside it where more is rounded for the figures."""
    width, itemsize = source.anatomy.hidden, _products(source).itemsize
    states = state_bytes(source.anatomy.blocks, effort.seen, width, itemsize)
    made = source.bytes_bf16() // 3
    return (
        room(groups, NEAR if effort.shown == 1 else MANY)
        + made
        + max(states, 3 * effort.calibration * width * itemsize)
    )


def variants(effort: Effort) -> tuple[int, int]:
    """How many single-group variants are measured, and how many whole ones."""
    return effort.checks + effort.checks // 2, OUTSIDE + effort.neighbours * effort.rounds + min(effort.shown, 8)


def seconds(source: Source, groups: Sequence[SiteGroup], effort: Effort) -> float:
    """An estimate of the whole search."""
    wide, narrow, threads = duration.speed(), duration.speed(_products(source)), torch.get_num_threads()
    head = source.anatomy.site("head").shape
    inner = source.parameters() - head[0] * head[1] * (1 if source.anatomy.tied else 2)
    block_T = 2 * inner * narrow * duration.OVERHEAD
    head_T = 2 * head[0] * head[1] * wide + SCORING * head[0] / threads
    few_T, each_T = duration.OVERHEAD * 6 * head[0] * head[1] * narrow, block_T + head_T
    taps = {site.tap: site.shape[1] for group in groups for site in group.sites if site.tap is not None}
    grams = sum(effort.seen * width**2 * narrow + width**3 * wide for width in taps.values())
    backward = effort.seen * 1.5 * block_T + effort.gradient * (3 * block_T + few_T)
    column, weight = _rates()
    tried = sum(
        column
        * group.sites[0].shape[1]
        * len(narrowed(group).options)
        * sum(min(1.0, s.shape[0] / ROWS) for s in group.sites)
        for group in groups
    )
    options = NEAR if effort.shown == 1 else MANY
    weights = sum(s.shape[0] * s.shape[1] for group in groups for s in group.sites)
    feedback = sum(2 * s.shape[0] * s.shape[1] ** 2 * wide for group in groups for s in group.sites)
    whole = options * (weights * weight / threads + feedback)
    singles, wholes = variants(effort)
    trials = effort.search * ((singles / 2 + wholes) * block_T + (singles + wholes) * head_T)
    final = effort.evaluation * each_T * (2 + min(effort.shown, 8) + min(effort.uniforms, 4))
    built = effort.search * each_T + _made(source, groups, effort)
    return backward + 2 * grams + effort.seen * block_T + tried / threads + whole + trials + final + built + 25


def course(source: Source, groups: Sequence[SiteGroup], effort: Effort, speeds: bool) -> dict[str, float]:
    """The steps of a search in order, and what each is expected to take, from counts alone: for a progress bar."""
    head = source.anatomy.site("embed").shape  # a head is as large; what has none is refused soon
    inner = source.parameters() - head[0] * head[1] * (1 if source.anatomy.tied else 2)
    block_T, few_T = 2 * inner * duration.NOMINAL, 2 * head[0] * head[1] * duration.NOMINAL + SCORING * head[0]
    weights = sum(s.shape[0] * s.shape[1] for group in groups for s in group.sites)
    columns = sum(group.sites[0].shape[1] * len(narrowed(group).options) for group in groups)
    singles, wholes = variants(effort)
    built = effort.calibration * 2 * block_T + weights * duration.ROUNDED
    return {
        "open": 1.0,
        "profile": 5.0 if speeds else 0.0,
        "text": 1.0,
        "forward": 0.5 + effort.seen * block_T,
        "sensitivity": 2 + columns * COLUMN + effort.seen * block_T + effort.gradient * (3 * block_T + few_T),
        "frontier": 0.5,
        "rounding": 1 + effort.seen * block_T + (NEAR if effort.shown == 1 else MANY) * weights * duration.ROUNDED,
        "trials": 1 + effort.search * singles * (block_T / 2 + few_T),
        "allocation": 2 + effort.search * wholes * (block_T + few_T),
        "build": 1 + built,
        "timing": 3.0 if speeds else 0.0,
        "evaluation": 1 + effort.evaluation * (block_T + few_T) * (2 + min(effort.shown, 8) + min(effort.uniforms, 4)),
        "costs": 4.0 + 8.0 * effort.memory,
        "samples": 1.0,
    }


def _products(source: Source) -> torch.dtype:
    return quickest(source.dtype, source.anatomy.hidden)


def _made(source: Source, groups: Sequence[SiteGroup], effort: Effort) -> float:
    """Seconds of making one artifact."""
    picks = {group.name: next((o for o in group.options if o.bits == 4), group.options[0]) for group in groups}
    job = prepare(plan_of(picks, groups, "fit", "", effort.calibration, 256), source)
    assert job is not None, "refusals are raised"
    return duration.seconds(job, effort.calibration)


def _rates() -> tuple[float, float]:
    """Seconds a column of error feedback on few rows, and a weight of it on many, both with one thread."""
    generator, found = torch.Generator().manual_seed(0), []
    x_TI = torch.randn(EDGE, EDGE, generator=generator, dtype=torch.float32, device="cpu")
    for rows in (ROWS, 4 * ROWS):
        w_OI = torch.randn(rows, EDGE, generator=generator, dtype=torch.float32, device="cpu")
        taken = []
        for group in (128, 32):
            choice = integer(4, group).choice
            assert choice is not None, "not full precision"
            stats, fmt, rounder = {"hessian": x_TI.T @ x_TI / EDGE}, parts.format_of(choice), parts.rounder_of(choice)
            rounder(w_OI[:32], fmt, stats)
            began = time.thread_time()
            rounder(w_OI, fmt, stats)
            taken.append(time.thread_time() - began)
        found.append(sum(taken) / len(taken))
    return found[0] / EDGE, found[1] / (4 * ROWS * EDGE)
