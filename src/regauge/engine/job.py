"""Everything that is decided before any work: the plan on this model, its moves, its wire, and what it needs to see.

`prepare` finds every refusal first and raises them together; what it returns is what `--dry-run` prints and what the
driver carries out. Cost: reading headers; no weight is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from regauge import parts
from regauge.anatomy.model import Anatomy, Site
from regauge.anatomy.moves import Move
from regauge.artifact.codec.base import Wire
from regauge.elastic.family import Family, unranked
from regauge.engine.families import offering
from regauge.engine.inner import ranged
from regauge.engine.refusals import Refusals
from regauge.engine.shaping import Shaping, shaping_of
from regauge.engine.taps import needs_of_taps, refuse_outside
from regauge.engine.wiring import wired
from regauge.errors import RecipeError
from regauge.formats.base import OBJECTIVE, Format
from regauge.hosts import host_of
from regauge.hosts.base import Host, Source
from regauge.kernels.cpu.gram import has_gram
from regauge.learn.base import Finished, Taught
from regauge.learn.settings import BLOCK, Settings
from regauge.parts import ATTENTION, SHAPE, WEIGHTS, Point, Spec
from regauge.plan import Plan, load
from regauge.plan.forms import needs_of
from regauge.plan.learnable import learnt, learnt_of_tap, static_taps
from regauge.plan.resolution import Resolution, inert, resolve
from regauge.plan.sorting import sorting
from regauge.rewrites.base import TRAINED, Rewrite
from regauge.rounding.base import DRIFT

NARROW_FROM = 512
"""Hidden size from which blocks run in bfloat16: below it a product costs more to begin than to do."""


@dataclass(frozen=True, eq=False)
class Recast:
    """A rewrite with its name.

    Attributes:
        moves: those it made for the whole model; empty where it works block by block or waits for statistics.
    """

    spec: Spec
    rewrite: Rewrite
    moves: tuple[Move, ...] = ()

    @property
    def name(self) -> str:
        return parts.spell("rewrite", self.spec) or self.spec.part


@dataclass(frozen=True, eq=False)
class Job:
    """A plan on a model.

    Attributes:
        anatomy: after the rewrites of the whole model, in the sizes that pruning leaves.
        recasts: every rewrite in order, those of the whole model first.
        resolution: what each site gets.
        wire: how the artifact is laid out; `refusals` says why it is not compressed-tensors.
        needs: site → statistics that its rounder and compensator need; sites that need none are absent.
        shaping: what is pruned, if anything is; `gauge` is then the anatomy before that.
        learnt: site → what is trained there by the error of its block; most have nothing.
        at_once: how many matrices are rounded at the same time; None: as many as there are threads.
        finished: block → what training at the scope of the model left of it; None: of what lies outside the blocks.
    """

    plan: Plan
    source: Source
    anatomy: Anatomy
    recasts: tuple[Recast, ...]
    resolution: Resolution
    wire: Wire
    refusals: tuple[str, ...]
    needs: Mapping[str, frozenset[str]]
    seed: int = 0
    shaping: Shaping | None = None
    gauge: Anatomy | None = None
    learnt: Mapping[str, Taught] = field(default_factory=dict)
    at_once: int | None = None
    family: Family | None = None
    finished: Mapping[int | None, Finished] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        return host_of(self.source.path)

    @property
    def moves(self) -> tuple[Move, ...]:
        """Moves of the whole model, in order."""
        return tuple(move for recast in self.recasts for move in recast.moves)

    @property
    def local(self) -> tuple[Recast, ...]:
        """Rewrites that work block by block."""
        return tuple(recast for recast in self.recasts if recast.rewrite.scope == "block")

    @property
    def trained(self) -> tuple[Recast, ...]:
        """Rewrites whose moves are trained with each block."""
        return tuple(recast for recast in self.recasts if TRAINED in recast.rewrite.needs)

    @property
    def whole(self) -> Anatomy:
        """The anatomy before anything is taken out."""
        return self.anatomy if self.gauge is None else self.gauge

    @property
    def unpruned(self) -> Job:
        """The same job without its pruning; its formats are not for these sizes."""
        return replace(self, anatomy=self.whole, shaping=None, gauge=None)

    def moved_to(self, anatomy: Anatomy) -> Job:
        """The same job after a rewrite made `anatomy` of the whole model."""
        made = (anatomy, None) if self.shaping is None else (self.shaping.pruned(anatomy), anatomy)
        return replace(self, anatomy=made[0], gauge=made[1])

    @property
    def choices(self) -> Mapping[str, Point | None]:
        return self.resolution.choices

    @property
    def calibrated(self) -> bool:
        """Whether any part wants to see text."""
        return (
            bool(self.needs or self.learnt or self.shaping or unranked(self.family) or self.plan.statistics)
            or bool(needs_of_taps(self.anatomy.sites, self.resolution.inputs, transforms=True))
            or ranged(self.anatomy, self.resolution.inputs)
            or bool(needs_of(self.resolution.at(ATTENTION)))
            or any(r.rewrite.needs or r.rewrite.search for r in self.recasts)
        )

    @property
    def taught(self) -> bool:
        """Whether any part asks for the teacher's states."""
        asked = (*self.needs.values(), *(recast.rewrite.needs for recast in self.recasts))
        by_block = bool(self.learnt or static_taps(self.resolution.inputs)) and self.settings.scope == BLOCK
        return by_block or any(needs & {DRIFT, OBJECTIVE} for needs in asked)

    @property
    def working(self) -> torch.dtype:
        """What blocks are run in while they are looked at: the source's own bfloat16 where this CPU multiplies that
        faster, else float32. What is trained is trained in float32, and what is proved is proved in float64."""
        return torch.float32 if self.taught else quickest(self.source.dtype, self.anatomy.hidden)

    @property
    def settings(self) -> Settings:
        """How what is learnt is trained."""
        return Settings(**self.plan.learning)  # type: ignore[arg-type]  # of the kinds that the parser checked

    @property
    def certified(self) -> bool:
        """Whether there are moves to certify."""
        return bool(self.recasts)

    @property
    def reads_head(self) -> bool:
        """Whether statistics of the head's input are wanted."""
        return "head" in self.needs

    @property
    def learnt_taps(self) -> Mapping[str, Point]:
        """Taps whose transform is trained."""
        return {tap: point for tap, point in self.resolution.inputs.items() if learnt_of_tap(point)}

    def sites(self, block: int | None) -> list[Site]:
        return list(self.anatomy.in_block(block))

    def format(self, site: str) -> Format:
        choice = self.choices[site]
        assert choice is not None, f"{site} is kept in full precision"
        return parts.format_of(choice)


def waits(recast: Recast) -> bool:
    """Whether a rewrite of the whole model needs statistics of every site first."""
    return recast.rewrite.scope == "model" and bool(recast.rewrite.needs)


def quickest(stored: torch.dtype, hidden: int) -> torch.dtype:
    """What blocks of this width are run in while they are looked at, where nothing has to be exact."""
    narrow = stored is torch.bfloat16 and hidden >= NARROW_FROM
    return torch.bfloat16 if narrow and has_gram() else torch.float32


def plan_of(recipe: str | Path | Plan) -> Plan:
    """A plan as it is, a preset by name, or a recipe file."""
    return recipe if isinstance(recipe, Plan) else load(recipe)


def prepare(
    plan: Plan, source: Source, wire: str | None = None, seed: int = 0, refusals: Refusals | None = None
) -> Job | None:
    """Decides everything. With `refusals` given, errors go there and None comes back where no job can be made.

    Raises:
        RecipeError, MoveError, RefusedError: what stands in the way.
    """
    told = refusals or Refusals()
    known = len(told.errors)
    if plan.train:
        why = f"recipe {plan.name!r} trains what it makes: use `regauge learn train {plan.name} MODEL -o OUT`"
        told.errors.append(RecipeError(why))
    whole, recasts = told.attempt(lambda: _recast(plan, source.anatomy), (source.anatomy, tuple[Recast, ...]()))
    shaping = told.attempt(lambda: shaping_of(plan, whole), None)
    anatomy = whole if shaping is None else shaping.pruned(whole)
    resolution, chosen = None, None
    if shaping is not None or not plan.of(SHAPE) or len(told.errors) == known:
        resolution = told.attempt(lambda: resolve(plan, anatomy), None)
    for recast in recasts if shaping is not None else ():
        if OBJECTIVE in recast.rewrite.needs:
            why = "by the error of a block, and cannot where the same recipe takes units out of blocks"
            told.errors.append(RecipeError(f"recipe {plan.name!r}: rewrite {recast.name!r} chooses {why}"))
    if resolution is not None:
        alone = resolution
        told.attempt(lambda: refuse_outside(anatomy, alone.inputs), None)
        told.errors += map(RecipeError, inert(plan, resolution))
        both = told.attempt(lambda: wired(plan, alone, source, anatomy, shaping, wire), None)
        resolution, chosen = (resolution, None) if both is None else both
    family, resolution = offering(plan.family, resolution, chosen, told)
    if refusals is None:
        told.settle()
    if resolution is None or chosen is None or len(told.errors) > known:
        return None
    resolution = replace(resolution, notes=[*resolution.notes, *chosen.notes])
    needs, gauge = needs_in(anatomy, resolution), None if shaping is None else whole
    every = any(TRAINED in recast.rewrite.needs for recast in recasts)
    turned = {tap for tap, point in resolution.inputs.items() if learnt_of_tap(point)}
    moving = {s.name for s in anatomy.sites if s.tap in turned or (every and s.block is not None)}
    taught = {name: _taught(point) for name, point in resolution.at(WEIGHTS).items() if learnt(point) or name in moving}
    given = resolution, chosen.wire, chosen.refusals, needs, seed, shaping, gauge, taught
    return Job(plan, source, anatomy, recasts, *given, family=family)


def resized(job: Job, kept: Mapping[str, int]) -> Job:
    """The job once it is known how many units stay in each stream.

    Raises:
        RecipeError: a format does not fit the sizes.
    """
    assert job.shaping is not None, "something is pruned"
    shaping = replace(job.shaping, kept=kept)
    anatomy = shaping.pruned(job.whole)
    alone = resolve(job.plan, anatomy)
    resolution, chosen = wired(job.plan, alone, job.source, anatomy, shaping, job.wire.name)
    resolution = replace(resolution, notes=[*resolution.notes, *chosen.notes])
    made = replace(job, anatomy=anatomy, shaping=shaping, resolution=resolution, wire=chosen.wire)
    return replace(made, needs=needs_in(anatomy, resolution))


def needs_in(anatomy: Anatomy, resolution: Resolution) -> dict[str, frozenset[str]]:
    """Site → statistics that its rounder and compensator need, and the step of its tap where that is static."""
    steps = needs_of_taps(anatomy.sites, resolution.inputs, transforms=False)
    wanted = {s.name: _needs(s, resolution.choices[s.name]) | steps.get(s.name, frozenset()) for s in anatomy.sites}
    return {name: needs for name, needs in wanted.items() if needs}


def _needs(site: Site, choice: Point | None) -> frozenset[str]:
    if choice is None or site.tap is None:
        return frozenset()
    compensator = parts.compensator_of(choice)
    needs = parts.rounder_of(choice).needs - {OBJECTIVE}
    return needs | (frozenset() if compensator is None else compensator.needs)


def _taught(point: Point) -> Taught:
    """What is learnt of a matrix: whatever needs the objective, that is the contract of the need."""
    found = {axis: parts.build(axis, point.spec(axis)) for axis in learnt(point)}
    return Taught(**found)


def _recast(plan: Plan, anatomy: Anatomy) -> tuple[Anatomy, tuple[Recast, ...]]:
    """The anatomy after the rewrites of the whole model that need no statistics, and every rewrite."""
    recasts: list[Recast] = []
    for spec in sorting(plan):
        recast = Recast(spec, parts.build("rewrite", spec))
        if recast.rewrite.scope == "source":
            continue  # done when the source was opened: `factoring`
        earlier = [r for r in recasts if r.rewrite.scope == "block"]
        if recast.rewrite.scope == "model" and earlier:
            raise RecipeError(
                f"recipe {plan.name!r}: rewrite {recast.name!r} works on the whole model and {earlier[0].name!r} block "
                f"by block; put {recast.name!r} first"
            )
        if recast.rewrite.scope == "model" and not recast.rewrite.needs:
            anatomy, moves = recast.rewrite(anatomy, {}, {}, None, None)
            recast = replace(recast, moves=tuple(moves))
        recasts.append(recast)
    return anatomy, tuple(recasts)
