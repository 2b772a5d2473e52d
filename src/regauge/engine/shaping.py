"""Pruning as the engine does it: which streams a plan cuts and to what sizes, and the cutting of one block.

Sizes are known before any work where the allocation asks for no scores; otherwise `settle_shape` takes one pass of the
original model for them. A block is cut after its exact moves were certified and before its matrices are rounded: its
streams are scored on what they read of the compressed model so far, units go, what stays is repaired. A `select` keeps
no function, so it is measured: the block's output against that of the block before the cut, on the calibration text.
Cost: for each block one run to see (two with XᵀX of its inner width), and two more on `MEASURED` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.artifact.receipt import SelectReceipt
from regauge.engine.distribution import Bound as Run
from regauge.errors import RecipeError
from regauge.parts import SHAPE, Point
from regauge.plan import Plan
from regauge.plan.matching import match
from regauge.prune.base import Allocation, Group, Repair, Schedule, Score, Unit, groups, reader

if TYPE_CHECKING:
    from regauge.engine.job import Job
    from regauge.hosts.states import States
    from regauge.rounding.base import Stats

MEASURED = 16384  # tokens on which a cut is measured


@dataclass(frozen=True, eq=False)
class Cut:
    """How one stream is pruned: a part on each axis."""

    stream: str
    point: Point
    unit: Unit
    score: Score
    allocation: Allocation
    schedule: Schedule
    repair: Repair

    @staticmethod
    def of(stream: str, point: Point) -> Cut:
        unit, score, allocation, schedule, repair = (parts.build(axis, point.spec(axis)) for axis in parts.AXES[SHAPE])
        return Cut(stream, point, unit, score, allocation, schedule, repair)

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of what the stream's reader reads."""
        return self.score.needs | self.repair.needs


@dataclass(frozen=True, eq=False)
class Shaping:
    """What a plan prunes.

    Attributes:
        cuts: stream → how.
        kept: stream → units that stay; before scores are known, what an even cut would leave.
        waiting: whether `kept` waits for scores.
    """

    cuts: Mapping[str, Cut]
    kept: Mapping[str, int]
    waiting: bool = False

    def pruned(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy in the sizes that stay."""
        return transform(
            [
                Move("select", name, torch.arange(count, dtype=torch.int64, device="cpu"))
                for name, count in self.kept.items()
            ],
            anatomy,
        )

    def blocks(self, anatomy: Anatomy) -> list[int]:
        """The blocks out of which something is taken."""
        return sorted({block for name in self.cuts if (block := anatomy.stream(name).block) is not None})

    def needs(self, anatomy: Anatomy) -> dict[str, frozenset[str]]:
        """Site → statistics that scores and repairs of its units need, over all blocks."""
        return needs_of(anatomy, [(anatomy.stream(name), cut) for name, cut in self.cuts.items()])

    def in_block(self, anatomy: Anatomy, block: int) -> list[tuple[Stream, Cut]]:
        """The streams of a block that are cut."""
        return [(anatomy.stream(name), cut) for name, cut in self.cuts.items() if anatomy.stream(name).block == block]


def shaping_of(plan: Plan, anatomy: Anatomy) -> Shaping | None:
    """What the plan prunes of a model; None where it prunes nothing.

    Raises:
        RecipeError: a stream that does not exist or has no such units, a part or option that is none: every reason.
    """
    if not plan.of(SHAPE):
        return None
    reasons: list[str] = []
    won = {name: found.point for name, found in match(plan, SHAPE, anatomy, reasons).items()}
    cuts: dict[str, Cut] = {}
    for name, point in won.items():
        if point is None:
            continue
        try:
            cut = Cut.of(name, point)
        except RecipeError as error:
            reasons.append(str(error))
            continue
        refusal = _stream(anatomy, name, cut)
        if refusal is None:
            cuts[name] = cut
        else:
            reasons.append(refusal)
    if not reasons and cuts:
        try:
            return replace(
                Shaping(cuts, {}, any(cut.allocation.scored for cut in cuts.values())), kept=allot(cuts, anatomy, {})
            )
        except (RecipeError, ValueError) as error:
            reasons.append(str(error))
    if reasons:
        raise RecipeError(f"recipe {plan.name!r} does not fit this model: {'; '.join(dict.fromkeys(reasons))}")
    return None


def _stream(anatomy: Anatomy, name: str, cut: Cut) -> str | None:
    if name not in anatomy.stream_names:
        unit = cut.point.spec("unit").part
        return f"unit {unit!r} cannot be taken out of {name}, a whole block; write blocks.*.ffn"
    return cut.unit.refuses(anatomy.stream(name))


def allot(cuts: Mapping[str, Cut], anatomy: Anatomy, scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Stream → units that stay. Streams with the same allocation are allotted together.

    An allocation that wants scores and has none yet is stood in for by an even cut of the same share.
    """
    together: dict[object, list[Cut]] = {}
    for cut in cuts.values():
        together.setdefault(cut.point.spec("allocation"), []).append(cut)
    whole = {name: group for group in groups(anatomy, (anatomy.stream(name) for name in cuts)) for name in group.names}
    kept: dict[str, int] = {}
    for some in together.values():
        held: list[Group] = list(dict.fromkeys(whole[cut.stream] for cut in some))
        allocation = some[0].allocation
        alike = {
            name: torch.linspace(1, 2, g.units, dtype=torch.float64, device="cpu") for g in held for name in g.names
        }
        kept |= allocation(held, scores or alike)
    return kept


def needs_of(anatomy: Anatomy, cuts: Iterable[tuple[Stream, Cut]], repair: bool = True) -> dict[str, frozenset[str]]:
    """Site → statistics, of the sites that read the streams."""
    found = {reader(anatomy, stream).name: cut.needs if repair else cut.score.needs for stream, cut in cuts}
    return {name: needs for name, needs in found.items() if needs}


def scores_of(
    anatomy: Anatomy, cuts: Sequence[tuple[Stream, Cut]], weights: Weights, stats: Mapping[str, Stats]
) -> dict[str, Tensor]:
    """Stream → score of each of its units."""
    return {
        stream.name: cut.score(stream, weights, stats.get(reader(anatomy, stream).name, {})) for stream, cut in cuts
    }


def told(point: Point) -> dict[str, object]:
    """A point as flat data, each part in its one-line spelling."""
    from regauge.plan import coordinates

    return dict(coordinates(point))


def steps_of(cuts: Sequence[tuple[Stream, Cut]], kept: Mapping[str, int]) -> list[dict[str, int]]:
    """How many units each stream has after each step. A stream that is done waits for the others."""
    each = [cut.schedule(stream.size, kept[stream.name]) for stream, cut in cuts]
    rows = zip_longest(*each)
    last = {stream.name: stream.size for stream, _ in cuts}
    found = []
    for row in rows:
        last = last | {stream.name: count for (stream, _), count in zip(cuts, row, strict=True) if count is not None}
        found.append(last)
    return found


def cut_block(
    anatomy: Anatomy,
    cuts: Sequence[tuple[Stream, Cut]],
    weights: Weights,
    stats: Mapping[str, Stats],
    kept: Mapping[str, int],
) -> tuple[list[Move], Weights]:
    """One step on one block: the selects, and its tensors after them and after the repair, in float64."""
    scores = scores_of(anatomy, cuts, weights, stats)
    moves = []
    for stream, _ in cuts:
        best = scores[stream.name].argsort(descending=True, stable=True)[: kept[stream.name]]
        moves.append(Move("select", stream.name, best.sort().values))
    after = apply(moves, anatomy, weights, dtype=torch.float64)
    for (stream, cut), move in zip(cuts, moves, strict=True):
        site = reader(anatomy, stream).name
        name = f"{site}.weight"
        after[name] = cut.repair(weights[name].to(torch.float64), move.vector(), stats.get(site, {})).contiguous()
    return moves, after


def measured(job: Job, block: int, runs: tuple[Run, Run], states: States) -> SelectReceipt:
    """The whole block and the cut one beside each other, on the states of the compressed model."""
    sums, tokens = torch.zeros(3, dtype=torch.float64, device="cpu"), 0
    for batch, x_BTD in enumerate(states.hidden):
        whole_BTD, cut_BTD = (run(x_BTD, batch) for run in runs)
        for index, of in enumerate((cut_BTD - whole_BTD, whole_BTD, whole_BTD - x_BTD)):
            sums[index] += of.float().square().sum(dtype=torch.float64)
        tokens += x_BTD.shape[0] * x_BTD.shape[1]
        if tokens >= MEASURED:
            break
    lost, made, added = sums.tolist()
    return _select_receipt(job, block, (lost / made) ** 0.5, (lost / added) ** 0.5, tokens)


def _select_receipt(job: Job, block: int, error: float, added: float, tokens: int) -> SelectReceipt:
    """What was done to a block, with what it was measured to do."""
    assert job.shaping is not None, "something was taken out"
    cuts = job.shaping.in_block(job.whole, block)
    return SelectReceipt(
        block=block,
        streams=tuple(stream.name for stream, _ in cuts),
        how=told(cuts[0][1].point),
        before=sum(stream.size for stream, _ in cuts),
        after=sum(job.shaping.kept[stream.name] for stream, _ in cuts),
        error=error,
        added=added,
        tokens=tokens,
    )
