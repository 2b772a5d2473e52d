"""How long a job will take, told before it begins: small matrices are rounded and multiplied now, and scaled up.

Rounding grows with O·I for what is done to each weight, and with O·I² + I³/3 for error feedback and its factor, counted
at the rate of a float32 product. Blocks are run at the rate of a product in the dtype of the work. An estimate, within
half as much again of the truth on a machine that is as busy later as now.
Legend: T tokens, O output channels, I input channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from regauge import parts
from regauge.engine import learning_cost
from regauge.engine.block import round_site
from regauge.engine.job import Job
from regauge.engine.statistics import WIDE
from regauge.formats.runs import refusal
from regauge.parts import Point
from regauge.rounding.together import side_by_side

ROWS, EDGE = 1024, 512  # of the matrix that is tried: EDGE is a multiple of every group
PRODUCT = 1024  # edge of the product that is tried
OVERHEAD = 1.5  # of running a block, over its products
JUDGED = 2  # O·I² to judge a range that was tried beside the first
NORMS = 2  # batch norms of a block, for each of which it is run
SEEN = 0.75  # of a block's products that come before its last activation, about


def speed(dtype: torch.dtype = torch.float32, where: torch.device | None = None) -> float:
    """Seconds of one multiply or add in a product, taken now on a small one: the best of four."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(PRODUCT, PRODUCT, generator=generator, dtype=torch.float32, device="cpu").to(where, dtype)
        for _ in range(2)
    )
    found = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)[0, 0].item()  # a GPU is done when a number of it is here
        found.append(time.perf_counter() - started)
    return min(found[1:]) / (2 * PRODUCT**3)


def sweeps(choice: Point, shape: tuple[int, int]) -> int:
    """How often error feedback goes over a matrix of this shape; 1 where there is none."""
    return max(1, parts.rounder_of(choice).sweeps(parts.format_of(choice), shape))


def seconds(job: Job, tokens: int, sampled: bool = False) -> float:
    """Estimate: time of rounding, of reading and hashing, and of running the blocks on so many tokens.

    Args:
        sampled: the model samples those tokens first.
    """
    wide, narrow = speed(), speed(job.working)
    each = _each(job)
    rounding = each_total(job, each)
    feedback, errors = 0.0, 0.0
    for site in job.anatomy.sites:
        outputs, inputs = site.shape
        choice = job.choices[site.name]
        if "hessian" in job.needs.get(site.name, ()) and choice is not None:
            again = sweeps(choice, site.shape) - 1
            feedback += (1 + (1 + JUDGED) * again) * outputs * inputs**2 + 2 / 3 * inputs**3
            errors += 4 * outputs * inputs**2 * (narrow if inputs >= WIDE else wide)
    rounding += feedback * wide + errors
    total = rounding + job.source.bytes_bf16() * 2e-9  # reading, hashing and writing
    if job.calibrated:
        total += _passes(job, tokens, wide, narrow, rounding)
    if sampled:
        total += 2 * job.source.parameters() * tokens * narrow * 2  # a token at a time: slower than a long product
    if job.certified:
        total += job.source.parameters() * 60 * wide * 4
    return total


NOMINAL, ROUNDED = 5e-12, 5e-8  # seconds of an operation in a product, and of rounding a weight, on some machine


def course(job: Job, tokens: int, sampled: bool = False) -> dict[str, float]:
    """The phases of a job in order, and what each is expected to take, from counts alone: for a progress bar."""
    inner = sum(s.shape[0] * s.shape[1] for s in job.anatomy.sites if s.block is not None and s.expert in (None, 0, 1))
    once = 2 * inner * tokens * NOMINAL
    rounding = ROUNDED * sum(s.shape[0] * s.shape[1] for s in job.anatomy.sites)
    found = {"open": 0.5}
    if sampled:
        found["text"] = 4 * job.source.parameters() * tokens * NOMINAL
    for recast in job.recasts:
        points = sum(len(grid) for grid in recast.rewrite.search.values())
        if points:
            found[f"search of {recast.name}"] = points * (2 * once * min(tokens, 8192) / max(1, tokens) + rounding)
        elif recast.rewrite.scope == "model" and recast.rewrite.needs:
            found["survey"] = once
    if job.shaping is not None and job.shaping.waiting:
        found["scores"] = once
    runs = (1 + bool(job.needs) + len(job.local) + NORMS * bool(job.plan.statistics)) * job.calibrated
    learning = learning_cost.learning_cost(job, tokens, NOMINAL).seconds if job.learnt else 0.0
    return {**found, "blocks": runs * once + rounding + learning, "finish": 0.1}


def _passes(job: Job, tokens: int, wide: float, narrow: float, rounding: float) -> float:
    """Seconds of all that runs blocks, and of all that is summed of their inputs."""
    inner = sum(s.shape[0] * s.shape[1] for s in job.anatomy.sites if s.block is not None and s.expert in (None, 0, 1))
    once = 2 * inner * tokens * narrow * OVERHEAD
    runs = 1 + SEEN * bool(job.needs) + len(job.local) + NORMS * bool(job.plan.statistics)
    total = 0.0
    if job.shaping is not None:
        runs += 3 + job.shaping.waiting
        cut = {site.name: site.shape[1] for site in job.whole.sites if site.kind == "down"}
        wanted = job.shaping.needs(job.whole).items()
        total += sum(tokens * cut[name] ** 2 * narrow for name, needs in wanted if "hessian" in needs)
    total += runs * once
    taps = {site.tap: site.shape[1] for site in job.anatomy.sites if "hessian" in job.needs.get(site.name, ())}
    total += sum(tokens * width**2 * narrow for width in taps.values())
    if job.taught:
        total += once + learning_cost.learning_cost(job, tokens, wide).seconds
        choosing = sum(learning_cost.chooses(recast.rewrite.needs) for recast in job.local) * learning_cost.TRIES
        total += choosing * (once * min(tokens, 8192) / max(1, tokens) + rounding)
    for recast in job.recasts:
        points = sum(len(grid) for grid in recast.rewrite.search.values())
        total += points * (2 * runs * once * min(tokens, 8192) / max(1, tokens) + rounding)
    return total


def _each(job: Job) -> dict[Point, float]:
    """Seconds a weight of each choice, with as many rounded at once as there are threads."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(ROWS, EDGE, generator=generator, dtype=torch.float32, device="cpu")
    x_TI = torch.randn(EDGE, EDGE, generator=generator, dtype=torch.float32, device="cpu")
    stats = {"hessian": x_TI.T @ x_TI / EDGE, "second_moment": x_TI.square().mean(0)}
    found: dict[Point, float] = {}
    for choice in {choice for choice in job.choices.values() if choice is not None}:
        fmt = parts.format_of(choice)
        tried = w_OI if refusal(fmt, (ROWS, EDGE)) is None else w_OI[:, : EDGE - 2]
        if refusal(fmt, (ROWS, tried.shape[1])) is not None:
            continue
        count = torch.get_num_threads()
        started = time.perf_counter()
        side_by_side([_rounded(tried, choice, stats)] * count)
        found[choice] = (time.perf_counter() - started) / (tried.numel() * count)
    return found


def _rounded(w_OI: Tensor, choice: Point, stats: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: round_site(w_OI, choice, stats)


def each_total(job: Job, each: dict[Point, float]) -> float:
    """Seconds of what is done to each weight, once for the whole model."""
    sizes = ((site.shape[0] * site.shape[1], job.choices[site.name]) for site in job.anatomy.sites)
    return sum(each.get(choice, 0.0) * size for size, choice in sizes if choice is not None)
