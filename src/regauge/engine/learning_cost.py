"""What learning will cost in a job, before it begins: seconds over all blocks, and the most memory of one."""

from __future__ import annotations

import math

from regauge import parts
from regauge.engine.job import Job
from regauge.formats.base import OBJECTIVE
from regauge.learn.cost import Cost, Size, cost
from regauge.parts import WEIGHTS
from regauge.rewrites.base import TRAINED

TRIES = 21  # values that a rewrite tries by the block's error, about


def chooses(needs: frozenset[str]) -> bool:
    """Whether a rewrite of these needs tries values by the block's error, and is not trained by it."""
    return OBJECTIVE in needs and TRAINED not in needs


def learning_cost(job: Job, tokens: int, flop: float) -> Cost:
    """Seconds of all blocks together; bytes of the largest.

    Args:
        flop: seconds of one multiply or add in a product on this machine.
    """
    total, most = 0.0, 0
    for block in range(job.anatomy.blocks):
        sites = [site for site in job.sites(block) if site.expert in (None, 0, 1)]
        taught = [site for site in job.sites(block) if site.name in job.learnt]
        if not taught:
            continue
        parameters = 0
        for site in taught:
            own = job.learnt[site.name]
            groups, _ = parts.format_of(job.resolution.at(WEIGHTS)[site.name]).grain.groups(site.shape)
            parameters += 0 if own.ranger is None else groups * len(own.ranger.rates)
            parameters += 0 if own.rounder is None else math.prod(site.shape) * len(own.rounder.rates)
        size = Size(
            weights=sum(math.prod(site.shape) for site in sites),
            trained=sum(math.prod(site.shape) for site in taught),
            parameters=parameters,
            width=sum(sum(site.shape) for site in sites),
            tokens=tokens,
        )
        one = cost(size, job.settings, flop)
        total, most = total + one.seconds, max(most, one.bytes)
    return Cost(total, most)


def told(job: Job, tokens: int, flop: float | None) -> list[str]:
    """The passes that learning adds, a sentence each, with what they cost where the machine's speed is known."""
    said = []
    if job.taught:
        said.append("alongside, the uncompressed model's states: each block runs once more for what it should give")
    by_block = [recast.name for recast in job.local if chooses(recast.rewrite.needs)]
    if by_block:
        said.append(f"in each block, some {TRIES} runs of it on a part of the text to choose for {', '.join(by_block)}")
    if job.learnt:
        settings = job.settings
        steps = f"up to {settings.steps} training steps of {min(settings.batch, tokens):,} tokens"
        line = f"in each block, {steps}, for {len(job.learnt)} sites in all"
        if flop is not None:
            found = learning_cost(job, tokens, flop)
            line += f": about {found.seconds:.0f} s together, and {found.bytes / 1e6:,.0f} MB of memory beside a block"
        said.append(line)
    return said
