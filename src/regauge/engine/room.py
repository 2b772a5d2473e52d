"""How much memory a job takes at its highest, counted before it begins; and how many matrices it then rounds at once.

Anonymous bytes: what is mapped from files does not count. The terms are those of `Pass` and `Drive`, one block at a
time: the tensors of the block after its moves, XᵀX of each activation with its factor, the matrices in the making, the
compressed block, the batch in flight, and the states behind the last block and this one, unless they lie in files.
Legend: O outputs, I inputs, D hidden, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from regauge.anatomy.model import Site
from regauge.engine.job import Job
from regauge.engine.learning_cost import learning_cost
from regauge.engine.strips import STRIP
from regauge.engine.work import BATCH
from regauge.errors import BudgetError
from regauge.hosts.states import SPILL
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.rounding.pieces import PIECE, alone

LIBRARIES = 80 << 20  # what the model library and the process of the work take, beyond what a process has at first
FITTED, NEAREST = (
    13,
    5,
)  # bytes a weight of a matrix that is rounded with feedback (float32 three times, and codes), and without


@dataclass(frozen=True)
class Room:
    """Bytes.

    Attributes:
        always: the process, what lies outside the blocks, and the states.
        block: of a block at its highest, but for the matrices in the making.
        begin: of what lies outside the blocks, while it is moved and proved.
        making: of each matrix that is rounded at the same time, largest first.
    """

    always: int
    block: int
    making: tuple[int, ...]
    begin: int = 0

    def peak(self, at_once: int | None = None) -> int:
        """The most that is taken while so many matrices are rounded at once; as many as there are threads, if None."""
        count = torch.get_num_threads() if at_once is None else at_once
        return self.always + max(self.begin, self.block + sum(self.making[:count]))

    def at_once(self, bound: int | None) -> int:
        """How many matrices may be rounded at once: as many as there are threads, fewer under a bound.

        Raises:
            BudgetError: not even one would do; says what would.
        """
        threads = torch.get_num_threads()
        if bound is None:
            return threads
        fitting = [count for count in range(1, threads + 1) if self.peak(count) <= bound]
        if not fitting:
            raise BudgetError(
                f"this job takes {self.peak(1):,} bytes of memory at the least, and --max-memory allows {bound:,}; "
                "give it that, or choose a recipe that reads no text."
            )
        return fitting[-1]


def room(job: Job, tokens: int) -> Room:
    """What a job takes on a text of so many tokens.

    Cost: none; nothing is read.
    """
    anatomy, working = job.whole, job.working.itemsize
    narrow = job.working is torch.bfloat16
    outside = [site for site in anatomy.in_block(None) if _made(job, site)]
    outer = sum(_made(job, site) * working for site in outside if not _alone(job, site))
    states = (1 + job.taught) * tokens * anatomy.hidden * working
    most, making = 0, tuple[int, ...]()
    needs = _needs(job)
    for block in range(anatomy.blocks):
        sites = list(anatomy.in_block(block))
        taps = {s.tap: s.shape[1] for s in sites if "hessian" in needs.get(s.name, ())}
        sums = sum(width**2 for width in taps.values()) * (4 if narrow else 8)
        factors = sum(width**2 for width in taps.values()) * 4
        factoring = max([width**2 for width in taps.values()], default=0) * (4 if narrow else 8)
        weights = sum(s.shape[0] * s.shape[1] for s in sites)
        made = sum(_made(job, site) for site in sites)
        moved = weights * (8 + 2 + 8) if job.recasts else 0
        cast = 0 if narrow and not moved else weights * working
        batch = _live(sites, anatomy.hidden) * min(tokens, BATCH) * working if job.calibrated else 0
        own = sorted((_piece(job, s) * (FITTED if s.tap in taps else NEAREST) for s in sites), reverse=True)
        seeing = sums + cast + batch
        rounding = sums + factors + made + max(0, factoring - sum(own[1:2]))  # nothing is made yet of what is factored
        running = (sums + made * (1 + working) + cast + batch) if job.calibrated else 2 * made
        highest = moved + max(seeing - sum(own[:2]), rounding, running - sum(own[:2]))
        if highest + sum(own[:2]) > most + sum(making[:2]):
            most, making = highest, tuple(own)
    head = [4 * _piece(job, site) for site in outside]
    always = anonymous_bytes() + LIBRARIES + outer + (2 * states if states <= SPILL else 0)
    own_matrices = [s for s in anatomy.in_block(None) if s.name != "head" or not anatomy.tied]
    strips = sum(min(s.shape[0] * s.shape[1], STRIP) for s in own_matrices)
    begin = strips * (8 + 2 + 8) * 2 if job.recasts else 0  # float64 before and after, and what is made of it
    ends = [2 * _made(job, s) + _piece(job, s) * FITTED + 12 * s.shape[1] ** 2 for s in outside]  # codes, and packed
    begin = max(begin, max(ends, default=0))
    if job.learnt:
        most += learning_cost(job, tokens, 0.0).bytes
    return Room(always, max(most, 0), making or tuple(sorted(head, reverse=True)), begin)


def _needs(job: Job) -> Mapping[str, frozenset[str]]:
    if job.shaping is None:
        return job.needs
    found = dict(job.needs)
    for name, needs in job.shaping.needs(job.whole).items():
        found[name] = found.get(name, frozenset()) | needs
    return found


def _made(job: Job, site: Site) -> int:
    """Weights of a site that is rounded, 0 where it stays as it is."""
    return site.shape[0] * site.shape[1] if job.choices.get(site.name) is not None else 0


def _alone(job: Job, site: Site) -> bool:
    return alone(job.format(site.name), site.shape)


def _piece(job: Job, site: Site) -> int:
    """Weights of a site that are rounded at a time."""
    made = _made(job, site)
    return min(made, PIECE) if made and _alone(job, site) else made


def _live(sites: Iterable[Site], hidden: int) -> int:
    """Numbers a token that are alive at once while a block runs: what the widest group of sites reads and makes."""
    made: dict[str, int] = {}
    read: dict[str, int] = {}
    for site in sites:
        if site.tap is not None and site.expert in (None, 0):
            made[site.tap] = made.get(site.tap, 0) + site.shape[0]
            read[site.tap] = site.shape[1]
    return max((made[tap] * 3 // 2 + read[tap] for tap in made), default=0) + 3 * hidden
