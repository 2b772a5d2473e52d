"""A family of many choices, built and loaded: what the search over members measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from regauge.anatomy.model import Anatomy
from regauge.artifact.cutting import opened
from regauge.elastic.family import EQUIDISTANT, RANKED, STAGES, Family
from regauge.elastic.legal import reasons
from regauge.engine.api import apply
from regauge.errors import RegaugeError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.plan import Plan, load
from regauge.search.budgets import Budget
from regauge.search.evolution import Effort, Genes, Measured, evolved
from regauge.search.members.normed import anew
from regauge.search.members.space import Members, Table, stored
from regauge.search.members.timing import Pace, Timed, timed
from regauge.search.members.trials import Trials, member
from regauge.search.members.wanted import Wanted
from regauge.search.pictures import Material
from regauge.text.split import Texts

EMBED = "int8"
"""The embedding's format beside weights that are rounded: of a small model it is a quarter."""
FFN = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)


@dataclass(frozen=True, eq=False)
class Goal:
    """A budget in the unit of what members take: bytes, or milliseconds a token."""

    budget: Budget
    table: Table
    limit: float


@dataclass(frozen=True, eq=False)
class Built:
    """A family that was built, with what is known of its members.

    Attributes:
        timed: how it runs, where a speed is asked for.
    """

    name: str
    folder: Path
    model: Any
    members: Members
    bytes: Table
    goals: tuple[Goal, ...]
    measured: Measured
    timed: Timed | None

    @property
    def whole(self) -> Genes:
        return (0,) * len(self.members.choices)

    def loss(self, effort: Effort, seed: int) -> float:
        """The sum of logarithms of what the best members for all goals lose; inf where one cannot be met."""
        total = 0.0
        for goal in self.goals:
            found = self.best(goal, goal.limit, effort, seed)
            total += math.inf if found is None else math.log(max(self.measured(found), 1e-6))
        return total

    def best(self, goal: Goal, limit: float, effort: Effort, seed: int) -> Genes | None:
        """The best member within a limit."""
        if goal.table(self.whole) <= limit:
            self.measured(self.whole)
            return self.whole
        space = self.members.space(goal.table)
        return evolved(space, limit, self.measured, list(self.members.alike()), effort, seed)

    def nearest(self) -> str:
        """How near each goal comes, at the least."""
        said = []
        for goal in self.goals:
            least = min(goal.table(genes) for genes in self.members.alike())
            if least > goal.limit:
                said.append(f"{goal.budget.text}: the smallest member takes {least / goal.limit:.2f} times that")
        return "; ".join(said)


def built(
    source: Source, weights: str, wanted: Wanted, texts: Material, budgets: Sequence[Budget]
) -> Callable[[Path, Trials, Pace | None], Built]:
    """Builds a family in a folder, with weights as a preset has them ("": as the source), and loads it."""

    def build(folder: Path, trials: Trials, pace: Pace | None) -> Built:
        plan = load("family" if not weights else f"family+{weights}")
        if not (folder / "config.json").exists():  # or a search that was killed had built it
            apply(
                _offering(plan, source.anatomy),
                source.path,
                folder,
                **texts.given,
                seed=wanted.seed,
                embed=EMBED if weights and isinstance(texts, Texts) else None,
                force=True,
            )
        model = host_of(source.path).load(folder, dtype=torch.float32)
        members, layout = Members.of(model.regauge.family, model.regauge.anatomy), opened(folder).layout
        sizes = Table.of_bytes(members, stored(layout), folder)
        speed = None if pace is None else timed(pace, folder, members, layout)
        goals = []
        for budget in budgets:
            if budget.resource == "memory":
                goals.append(Goal(budget, sizes, float(budget.bytes(source.bytes_bf16()))))
            else:
                assert speed is not None and pace is not None, "a speed is asked for"  # noqa: PT018  # not a test
                goals.append(Goal(budget, speed.tables[budget.resource], pace.base[budget.resource] / budget.amount))

        def lost(genes: Genes) -> float:
            subnet = members.subnet(genes)
            anew(model, subnet, texts)
            return trials.kl(member(model, subnet))

        measured = Measured(lost)
        return Built(weights, folder, model, members, sizes, tuple(goals), measured, speed)

    return build


def _offering(plan: Plan, anatomy: Anatomy) -> Plan:
    """The plan with a family of many choices."""
    return replace(plan, name="members", family=offered(anatomy))


def offered(anatomy: Anatomy) -> Family:
    """A family of many choices, of whatever this model admits."""
    blocks, routed = anatomy.blocks, anatomy.plumbing.routed
    groups = max((stream.size for stream in anatomy.streams if stream.kind == "heads"), default=0)
    offers: dict[str, Any] = {
        "depth": tuple(range(blocks - 1, (blocks - 1) // 2, -1)),
        "ffn": FFN,
        "heads": tuple(range(groups - 1, (groups - 1) // 2, -1)),
        "experts": tuple(range(routed - 1, (routed - 1) // 2, -1)),
    }
    stays = STAGES if anatomy.plumbing.stays else EQUIDISTANT  # blocks between stages stay, whichever are chosen
    families = {name: Family(**{name: some}, layers=stays) for name, some in offers.items() if some}
    admitted = {name: offers[name] for name, family in families.items() if not reasons(family, anatomy)}
    if not admitted:
        raise RegaugeError("this model has no members: no block, neuron or head of it can be left out")
    return Family(**admitted, layers=stays if blocks < 2 or stays == STAGES else RANKED)
