"""How long a search will take and what it leaves on disk meanwhile, counted from the work it does.

Products at the rate of one that is timed now, in each dtype that is used; error feedback at the rate of a small matrix
that is rounded now, so much a column and so much a weight; the artifact as `apply` tells it. Within half as much again
of the truth on a machine that is as busy later as now.
Legend: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, thread_time

import torch

from regauge import parts
from regauge.engine import duration
from regauge.engine.job import quickest
from regauge.engine.watchdog import quiet_torch
from regauge.errors import BudgetError
from regauge.hosts.base import Source
from regauge.search.loop.desk import Effort
from regauge.search.losses.between import narrowed
from regauge.search.losses.borders import state_bytes
from regauge.search.losses.shelf import room
from regauge.search.losses.sites import ROWS
from regauge.search.options import SiteGroup, integer

NEAR, MANY = 3.0, 8.0
"""Options of a site that are rounded whole: those that may win; those of a whole frontier."""
EDGE = 512
OUTSIDE = 8  # variants of embedding and head
SOLVED = 0.002  # seconds that the program takes a group, each time that it is solved
WAITING = 1.5  # times longer than at its best, from which one thread is faster than several
LOOK, LOOKED = 512, 0.5  # edge of a product, and seconds for which it is repeated to see how busy the machine is
OFF = 2.0  # by how much an estimate may be too long, before work is refused for it
FRESH = 6.0  # seconds of fresh processes that load the models, to read their memory
TIMED = 0.5  # seconds of one round of the interleaved timing, about
CODED = 2.0  # times longer, where attention reads codes that are made for each variant
SCORING = 2e-8  # seconds a logit: several passes over it


def work_folder(source: Source, groups: Sequence[SiteGroup], effort: Effort) -> int:
    """Bytes that a search takes on disk: what is rounded, an artifact that is made with the states of its own
    calibration, and the states at the borders, which are made again beside it where more is rounded for the figures."""
    width, itemsize = source.anatomy.hidden, _products(source).itemsize
    states = state_bytes(source.anatomy.blocks, effort.seen, width, itemsize)
    made = source.bytes_bf16() // 3
    groups = [group for group in groups if group.store is None]
    return (
        room(groups, NEAR if effort.shown == 1 else MANY)
        + made
        + max(states, 3 * effort.calibration * width * itemsize)
    )


def variants(effort: Effort) -> tuple[int, int]:
    """How many single-group variants are measured, and how many whole ones."""
    return effort.checks + effort.checks // 2, OUTSIDE + effort.neighbours * effort.rounds + min(effort.shown, 8)


@dataclass(frozen=True)
class Rates:
    """What a machine takes.

    Attributes:
        wide, narrow: seconds of an operation in a product, in float32 and in the dtype of the products.
        column: seconds of a column of error feedback on few rows, with one thread.
        weight: seconds of rounding a weight, with one thread.
        threads: how many there are.
        busy: how many times longer everything takes now than with the machine to itself.
    """

    wide: float
    narrow: float
    column: float
    weight: float
    threads: int
    busy: float = 1.0


NOMINAL = Rates(duration.NOMINAL, duration.NOMINAL, 5e-6, duration.ROUNDED, 2)
"""Of some machine: where only ratios matter."""


def measured(source: Source) -> Rates:
    """Of this machine now, as busy as it is."""
    rates = (duration.speed(), duration.speed(_products(source)), *_rates())
    return Rates(*rates, torch.get_num_threads(), _busy())


def paced(source: Source) -> tuple[Rates, int | None]:
    """The rates, and with how many threads a search under a limit runs: one where others take so much of the CPUs that
    threads would mostly wait for each other; None: as many as there are."""
    rates = measured(source)
    if rates.busy < WAITING or rates.threads == 1:
        return rates, None
    with quiet_torch(1):
        return measured(source), 1


def _busy() -> float:
    """How much longer work takes now than at its best, for what other processes take of the CPUs.

    Of small products, whose threads wait for each other, it is the mean over the least; of one thread, the clock over
    its own time. A search is made of both, and what it takes lies between.
    """
    a = torch.ones(LOOK, LOOK, dtype=torch.float32, device="cpu")
    torch.mm(a, a)  # the first is slower by itself
    taken, until = list[float](), perf_counter() + LOOKED
    while perf_counter() < until or len(taken) < 3:
        began = perf_counter()
        torch.mm(a, a)
        taken.append(perf_counter() - began)
    began, own = perf_counter(), thread_time()
    while perf_counter() < until + LOOKED:
        pass
    alone = (perf_counter() - began) / max(1e-3, thread_time() - own)
    return max(1.0, math.sqrt(sum(taken) / len(taken) / min(taken) * alone))


def steps(
    source: Source, groups: Sequence[SiteGroup], effort: Effort, rates: Rates, speeds: bool = False
) -> dict[str, float]:
    """The steps of a search in order, and the seconds that each is expected to take.

    Args:
        speeds: a speed is asked for, so the machine is profiled and the artifact timed.
    """
    stores = sum(group.store is not None for group in groups)
    groups = [group for group in groups if group.store is None]
    head = source.anatomy.site("embed").shape  # a head is as large; what has none is refused soon
    inner = source.parameters() - head[0] * head[1] * (1 if source.anatomy.tied else 2)
    block_T = 2 * inner * rates.narrow * duration.OVERHEAD
    head_T = 2 * head[0] * head[1] * rates.wide + SCORING * head[0] / rates.threads
    few_T = duration.OVERHEAD * 6 * head[0] * head[1] * rates.narrow
    taps = {site.tap: site.shape[1] for group in groups for site in group.sites if site.tap is not None}
    grams = sum(effort.seen * width**2 * rates.narrow + width**3 * rates.wide for width in taps.values())
    tried = sum(
        rates.column
        * group.sites[0].shape[1]
        * len(narrowed(group).options)
        * sum(min(1.0, s.shape[0] / ROWS) for s in group.sites)
        for group in groups
    )
    weights = sum(s.shape[0] * s.shape[1] for group in groups for s in group.sites)
    feedback = sum(_swept(group) * s.shape[0] * s.shape[1] ** 2 * rates.wide for group in groups for s in group.sites)
    options = NEAR if effort.shown == 1 else MANY
    singles, wholes = variants(effort)
    shown = min(effort.shown, 8) + min(effort.uniforms, 4)
    made = 2 * effort.calibration * block_T + grams + feedback + weights * rates.weight * 2
    solved = SOLVED * (len(groups) + stores)
    block_T *= CODED if stores else 1.0  # behind what is made and read back
    found = {
        "open": 1.0,
        "profile": 6.0 * speeds,
        "text": 0.5,
        "forward": 0.2 + effort.seen * block_T,
        "sensitivity": 0.5
        + tried / rates.threads
        + grams
        + 0.5 * effort.seen * block_T
        + effort.gradient * (3 * block_T + few_T),
        "frontier": solved * (effort.points + effort.draws),
        "rounding": 0.2 + effort.seen * block_T + grams + options * (weights * rates.weight / rates.threads + feedback),
        "trials": 0.2 + effort.search * singles * (block_T / 2 + head_T),
        "allocation": solved * 3 * effort.neighbours * effort.rounds + effort.search * wholes * (block_T + head_T),
        "build": 1 + made + effort.search * (block_T + head_T),
        "timing": TIMED * effort.turns * speeds,
        "drafts": 2 * (1 + TIMED * effort.turns) * speeds,
        "evaluation": 0.5 + effort.evaluation * (block_T + head_T) * (2 + shown),
        "costs": TIMED * effort.turns + FRESH * effort.memory,
        "samples": 1.0 * effort.samples,
    }
    return {name: takes * rates.busy for name, takes in found.items()}


NEEDED = ("rounding", "build", "timing", "evaluation", "costs")
"""Steps that must still come once something is allocated."""
SURE = 0.85  # of the time that a user gives, what is expected to be used


@dataclass(frozen=True)
class Time:
    """A length of time that a user gives.

    Attributes:
        limit: seconds that are left of it.
        said: seconds as the user said.
        rates: of the machine now.
        speeds: a speed is asked for.
    """

    limit: float
    said: float
    rates: Rates
    speeds: bool = False


def within(source: Source, groups: Sequence[SiteGroup], most: Effort, time: Time) -> Effort:
    """The most effort that is expected to end in time.

    Raises:
        BudgetError: not even the least is near it; says what would do.
    """

    def takes(effort: Effort) -> float:
        return sum(steps(source, groups, effort, time.rates, time.speeds).values())

    for effort in most.lesser():
        if takes(effort) <= SURE * time.limit:
            return effort
    bare = takes(effort.needed())
    if bare > OFF * time.limit:
        raise BudgetError(
            f"--time {time.said:g}s does not suffice for a search of {source.parameters():,} parameters: the least "
            f"takes about {bare:.0f} s here now; give that or more, or use `regauge apply` with a preset."
        )
    return effort


def seconds(source: Source, groups: Sequence[SiteGroup], effort: Effort, speeds: bool = False) -> float:
    """An estimate of the whole search, on this machine as busy as it is now."""
    return sum(steps(source, groups, effort, measured(source), speeds).values())


def _swept(group: SiteGroup) -> float:
    """O·I² of one option of a group, in the mean: a sweep and its error, and again for every range that is tried."""
    shape = group.sites[0].shape
    times = [duration.sweeps(option.choice, shape) for option in group.options if option.choice is not None]
    return 2 + (1 + duration.JUDGED) * (sum(times) / len(times) - 1) if times else 2


def _products(source: Source) -> torch.dtype:
    return quickest(source.dtype, source.anatomy.hidden)


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
            began = thread_time()
            rounder(w_OI, fmt, stats)
            taken.append(thread_time() - began)
        found.append(sum(taken) / len(taken))
    return found[0] / EDGE, found[1] / (4 * ROWS * EDGE)
