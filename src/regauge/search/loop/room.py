"""How much memory a search takes at its highest, counted before it begins; and what is done at once under a bound.

Anonymous bytes, a term for each step: the backward pass, options rounded whole, variants, the artifact as the engine
makes it, and the final figures. The first two hold one block's XᵀX with its factors; with fewer matrices rounded at the
same time, and fewer variants in a pass, less is taken and the same comes out.
Legend: D hidden, V vocabulary, O outputs, I inputs, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regauge.amounts import told as size
from regauge.anatomy.model import Site
from regauge.engine import room as engine
from regauge.engine.job import prepare, quickest
from regauge.errors import BudgetError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.hosts.states import SPILL
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.measure import contexts
from regauge.rounding.pieces import PIECE
from regauge.search.budgets import Budget
from regauge.search.loop.desk import Effort, Limits
from regauge.search.loop.gather import UNIFORMS
from regauge.search.loop.problem import CHUNK as MEASURED
from regauge.search.losses.between import narrowed
from regauge.search.losses.borders import state_bytes
from regauge.search.losses.fisher import CHUNK
from regauge.search.losses.sites import ROWS
from regauge.search.losses.trials import STATES
from regauge.search.options import SiteGroup, plan_of
from regauge.search.subject import HELD, batch_tokens
from regauge.text.length import window_length

NEAR, LEAST = 3.0, 1 << 24  # options of a site that are rounded whole, about; bytes of states below which is no pass
SWEPT = 13  # bytes a weight of what is rounded with feedback
COPIES = 5  # float32 numbers for each logit of a batch, of two models side by side: three in use, two kept by the heap
PASSES = 8  # bytes of bfloat16 or float32 that a block's backward pass holds of each number that its sites read or make


@dataclass(frozen=True)
class Step:
    """One step of a search: bytes at its highest, of each matrix that is rounded meanwhile, and of variants' states.

    Attributes:
        states: bytes that variants take at most; what they take is as much as the limit where that is less.
    """

    name: str
    always: int
    making: tuple[int, ...] = ()
    states: int = 0

    def peak(self, limits: Limits) -> int:
        """Bytes under some limits."""
        count = limits.at_once or torch.get_num_threads()
        return self.always + sum(self.making[:count]) + min(self.states, limits.states)


@dataclass(frozen=True)
class SearchRoom:
    """The steps of a search."""

    steps: tuple[Step, ...]

    def highest(self, limits: Limits) -> Step:
        """The step that takes the most."""
        return max(self.steps, key=lambda step: step.peak(limits))

    def peak(self, limits: Limits) -> int:
        """The most that is taken under some limits."""
        return self.highest(limits).peak(limits)

    def limits(self, bound: int | None) -> Limits:
        """The widest limits that keep a bound.

        Raises:
            BudgetError: none do; says what would.
        """
        if bound is None:
            return Limits()
        for count in range(torch.get_num_threads(), 0, -1):
            states = STATES
            while states >= LEAST:
                found = Limits(count, states, bound)
                if self.peak(found) <= bound:
                    return found
                states //= 2
        least = Limits(1, LEAST)
        raise BudgetError(
            f"this search takes {self.peak(least):,} bytes of memory at the least ({self.highest(least).name}), and "
            f"--max-memory allows {bound:,}; give it that, or apply a recipe, which takes less."
        )


def room(
    source: Source,
    groups: Sequence[SiteGroup],
    effort: Effort,
    budgets: Sequence[Budget] = (),
    length: int | None = None,
) -> SearchRoom:
    """What a search of a model takes.

    Args:
        length: tokens of a window, where the user says how many.
        budgets: what was asked for; an artifact that is bound by none is taken to be half of its source.

    Cost: none; nothing is read.
    """
    groups = [group for group in groups if group.store is None]
    whole = source.bytes_bf16()
    stored = min([budget.bytes(whole) for budget in budgets if budget.resource == "memory"], default=whole // 2)
    anatomy = source.anatomy
    products = quickest(source.dtype, anatomy.hidden)
    cast = 0 if products is source.dtype else products.itemsize
    held = 4 * source.parameters() <= HELD
    process = anonymous_bytes() + engine.LIBRARIES + (4 * source.parameters() if held else 0)
    length = length or window_length(source.parameters(), None)
    shapes = {site.name: site.shape for site in anatomy.in_block(None)}
    embed = shapes.get("embed", (1, anatomy.hidden))
    head = shapes.get("head", embed)  # what has none is refused with its texts
    batch_T = max(length, batch_tokens(embed[0]) // length * length)
    spilt = state_bytes(anatomy.blocks, effort.seen, anatomy.hidden, products.itemsize)
    states = spilt if spilt <= SPILL else 0
    kept_T = max(batch_T, min(effort.gradient, effort.seen))
    drawn = batch_T * head[0] * products.itemsize * 3 + 3 * 4 * CHUNK
    gradients = 2 * kept_T * anatomy.hidden * products.itemsize
    steps = [Step("the backward pass behind the head", process + states + gradients + drawn)]
    logits = COPIES * 4 * batch_T * head[0] + 2 * 4 * CHUNK
    shown = min(effort.shown, effort.points + 1) + min(effort.uniforms, len(UNIFORMS))
    together = 4 * anatomy.hidden * max(effort.search * (MEASURED + 2), effort.evaluation * (shown + 2))
    most: dict[str, Step] = {}
    for block in range(anatomy.blocks):
        some = [group for group in groups if group.block == block]
        base = process + states + _weights(some, cast if not held else 0)
        found = _block(some, base, (gradients, kept_T, batch_T), products)
        variants = Step("variants", base - states + logits, states=together)
        for step in (*found, variants):
            before = most.get(step.name)
            if before is None or step.peak(Limits()) > before.peak(Limits()):
                most[step.name] = step
    outer = sorted(min(PIECE, s.shape[0] * s.shape[1]) * SWEPT for g in groups if g.block is None for s in g.sites)
    tables = max((s.shape[0] * s.shape[1] for g in groups if g.block is None for s in g.sites), default=0)
    joined = 2 * tables + 12 * anatomy.hidden**2  # 8 bits in pieces and as a whole; XᵀX of the head, and its factor
    steps.append(Step("options of embedding and head", process + states + joined, tuple(outer[::-1])))
    loaded = process + stored + sum(4 * math.prod(shapes[name]) for name in ("embed", "head") if name in shapes)
    ends = _figures(source, loaded + logits), Step("the speeds", loaded + _caches(source))
    return SearchRoom((*steps, *most.values(), _artifact(source, groups, effort), *ends))


def _caches(source: Source) -> int:
    """Caches of the three models that are timed side by side, at the longest context that may be."""
    a_token = 3 * 2 * source.anatomy.cached
    longest = host_of(source.path).context(source) or contexts.LENGTHS[-1]
    fitting = [n for n in contexts.LENGTHS if n <= longest and n * a_token <= contexts.CACHES]
    return max(fitting, default=0) * a_token


def _weights(groups: Sequence[SiteGroup], each: int) -> int:
    return sum(s.shape[0] * s.shape[1] * each for group in groups for s in group.sites)


def _block(
    groups: Sequence[SiteGroup], base: int, read: tuple[int, int, int], products: torch.dtype
) -> tuple[Step, Step]:
    """The backward pass through a block, and its options rounded whole."""
    gradients, kept_T, batch_T = read
    sites = [site for group in groups for site in group.sites]
    taps = {site.tap: site.shape[1] for site in sites}
    width = products.itemsize
    squares = sorted((wide**2 for wide in taps.values()), reverse=True)
    sums = sum(squares) * (4 if products is torch.bfloat16 else 8)
    factoring = 4 * (sum(squares) + sum(squares[:1]))  # each kept, and one more while the largest is made
    seen = kept_T * (sum(taps.values()) + sum(s.shape[0] for s in sites if s.expert is None)) * width
    tried = sum(4 * len(narrowed(g).options) * min(ROWS, s.shape[0]) * s.shape[1] for g in groups for s in g.sites)
    replay = PASSES * batch_T * (sum(taps.values()) + sum(s.shape[0] for s in sites if s.expert is None)) // 2
    small = _made(sites, ROWS)
    before = base + gradients + seen + sums + max(replay, factoring + tried)
    packed = sum(int(NEAR * s.shape[0] * s.shape[1] * 0.6) for s in sites)
    whole = base + sums + factoring + packed
    return Step("the backward pass", before, small), Step("options rounded whole", whole, _made(sites, None))


def _made(sites: Sequence[Site], rows: int | None) -> tuple[int, ...]:
    """Bytes of what is rounded as one: sites that read one activation are stacked, large ones cut."""
    sizes: dict[str | None, int] = {}
    for site in sites:
        size = (site.shape[0] if rows is None else min(rows, site.shape[0])) * site.shape[1]
        tap = site.tap if size < PIECE and site.expert is None else site.name
        sizes[tap] = sizes.get(tap, 0) + min(size, PIECE)
    return tuple(sorted((SWEPT * size for size in sizes.values()), reverse=True))


def _artifact(source: Source, groups: Sequence[SiteGroup], effort: Effort) -> Step:
    """The artifact as the engine makes it."""
    picks = {group.name: next((o for o in group.options if o.bits == 4), group.options[0]) for group in groups}
    job = prepare(plan_of(picks, groups, "fit", "", effort.calibration, 256), source)
    assert job is not None, "refusals are raised"
    found = engine.room(job, effort.calibration)
    most = found.always + max(found.begin, found.block)
    return Step("the artifact", most, found.making if found.begin <= found.block else ())


def _figures(source: Source, base: int) -> Step:
    """The artifact loaded, beside a block of the source in float32."""
    blocks = [
        sum(4 * s.shape[0] * s.shape[1] for s in source.anatomy.in_block(block))
        for block in range(source.anatomy.blocks)
    ]
    return Step("the final figures", base + max(blocks, default=0))


def told(found: SearchRoom, limits: Limits) -> str:
    """What a dry run says of it."""
    step = found.highest(limits)
    return f"about {size(step.peak(limits))} of memory at the highest ({step.name})"
