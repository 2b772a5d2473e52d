"""`fit --members`: one artifact, and for each budget the best member of it that was found, by measurement.

Each way of storing the weights that may serve is built once, sorted, as a family of many choices. Members are searched
by `evolution`, what they take by the formats (memory) or by products timed here (decode, prefill), what they lose by
true KL on a text. The way whose members lose least over all budgets (sum of logarithms) is taken, searched further, and
its members get names: `m0.50x` is what `memory=0.50x` asked for. Speeds are measured as members run, and a member that
misses its budget by measurement is searched for anew under a tighter one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regauge.anatomy.model import Anatomy
from regauge.artifact.config import CARRIED
from regauge.artifact.cutting import opened
from regauge.artifact.ownership import refuse_out, search_folder, tidy
from regauge.elastic.family import RANKED, Family
from regauge.elastic.legal import reasons
from regauge.engine.api import apply
from regauge.engine.watchdog import Clock, Watcher, nobody, quiet_torch
from regauge.errors import BudgetError, RecipeError, RegaugeError, SettingError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.plan import Plan, load
from regauge.search import budgets as written
from regauge.search.budgets import Budget
from regauge.search.evolution import Effort, Measured, evolved
from regauge.search.fit import move
from regauge.search.members.record import Chosen, MemberRecord, finish, name_of
from regauge.search.members.space import Members, Table, stored
from regauge.search.members.trials import TOKENS as TRIED
from regauge.search.members.trials import Trials, member, quality
from regauge.search.subject import predicting, reader
from regauge.text.corpora import Where
from regauge.text.split import Sizes, Texts, prepare

METHODS = ("", "gptq-w8", "gptq-w4g64")
"""Ways of storing weights that are tried, the largest first; "": as the source has them."""
EMBED = "int8"
"""The embedding's format beside weights that are rounded: of a small model it is a quarter."""
FFN = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
TOKENS = 16384
FIRST = Effort(evaluations=16, first=8, rounds=2)
"""Of each budget, for each way of storing weights."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        methods: presets of weights; () is `METHODS`.
        first, further: how many members are measured for each budget with every way, and with the one that is taken.
    """

    budgets: Sequence[str]
    calibration: Where | None = None
    eval: Where | None = None
    methods: str | Sequence[str] = ()
    tokens: int | None = None
    length: int | None = None
    seed: int = 0
    revision: str | None = None
    force: bool = False
    first: Effort = FIRST
    further: Effort = field(default_factory=Effort)

    @property
    def ways(self) -> tuple[str, ...]:
        """Presets of weights; "" and "none": as the source has them."""
        some = self.methods.split(",") if isinstance(self.methods, str) else self.methods
        return tuple("" if one.strip() == "none" else one.strip() for one in some) or METHODS


def refuse(given: Mapping[str, object]) -> None:
    """Options that a search over members does not take.

    Raises:
        SettingError: names those that were given.
    """
    wrong = [f"--{name}" for name, value in given.items() if value is not None]
    if wrong:
        raise SettingError(f"{', '.join(wrong)} and --members are not for one search; leave one of them out")


@dataclass(frozen=True, eq=False)
class Built:
    """A family that was built, with what is known of its members."""

    name: str
    folder: Path
    model: Any
    members: Members
    table: Table
    measured: Measured

    def loss(self, limits: Sequence[float], effort: Effort, seed: int) -> float:
        """The sum of logarithms of what the best members within some limits lose; inf where one cannot be met."""
        total = 0.0
        for limit in limits:
            found = self.best(limit, effort, seed)
            total += math.inf if found is None else math.log(max(self.measured(found), 1e-6))
        return total

    def best(self, limit: float, effort: Effort, seed: int) -> tuple[int, ...] | None:
        """The best member within a limit, as genes."""
        space = self.members.space(self.table)
        whole = (0,) * len(self.members.choices)
        if self.table(whole) <= limit:
            self.measured(whole)
            return whole
        return evolved(space, limit, self.measured, list(self.members.alike()), effort, seed)


def fit_members(model: str | Path, out: str | Path, wanted: Wanted, progress: Watcher | None = None) -> Chosen:
    """Searches, builds and measures a family with a member for each budget.

    Raises:
        BudgetError: a budget is malformed, none is given, or out of reach; says how near it came.
        RegaugeError: any other refusal.
    """
    clock, target = Clock(progress or nobody), Path(out).expanduser().absolute()
    budgets = tuple(written.parse_one(text) for text in wanted.budgets)
    if not budgets:
        raise BudgetError("members are chosen for budgets: give one or several, such as --budget memory=0.5x")
    if len({name_of(budget) for budget in budgets}) < len(budgets):
        raise BudgetError("two budgets are the same: each member is for one of its own")
    for budget in budgets:
        if budget.resource != "memory" or budget.context is not None:
            raise BudgetError(f"{budget.text!r}: members are chosen for memory=0.5x or memory=2GB")
    tidy(target)
    refuse_out(target, wanted.force, CARRIED)
    with quiet_torch():
        clock.say("open")
        source = host_of(model).open(model, wanted.revision)
        predicting(source)
        sizes = Sizes(wanted.tokens or TOKENS, 2048, 12288)
        texts = prepare(reader(source, wanted.seed, wanted.length), wanted.calibration, wanted.eval, sizes, wanted.seed)
        original = host_of(source.path).outputs
        vocabulary = source.anatomy.site("embed").shape[0]
        batches = [{"input_ids": batch.ids_BT} for batch in texts.search.batches(Trials.batch(vocabulary))]
        trials = Trials(texts.search, original(source.path, batches), vocabulary)
        with search_folder(target) as room:
            try:
                chosen, folder = _searched(source, budgets, wanted, texts, (room, trials, clock))
                move(folder, target, wanted.force)
            finally:
                for left in room.glob("family-*"):
                    shutil.rmtree(left, ignore_errors=True)
        clock.say("finish", f"{out} is written")
    return chosen


def _searched(
    source: Source, budgets: Sequence[Budget], wanted: Wanted, texts: Texts, at: tuple[Path, Trials, Clock]
) -> tuple[Chosen, Path]:
    room, trials, clock = at
    limits = [float(budget.bytes(source.bytes_bf16())) for budget in budgets]
    built: list[tuple[float, Built]] = []
    least, notes = math.inf, list(texts.notes)
    for number, name in enumerate(wanted.ways):
        clock.say("search", f"{name or 'full precision'}: built")
        try:
            found = _built(source, name, wanted, texts, (room / f"family-{number}", trials))
        except RecipeError as error:
            notes.append(f"{name} is not among what was tried: {error}")
            continue
        least = min(least, *(found.table(genes) for genes in found.members.alike()))
        loss = found.loss(limits, wanted.first, wanted.seed)
        clock.say("search", f"{name or 'full precision'}: {len(found.measured.losses)} members measured")
        if loss < math.inf:
            built.append((loss, found))
        if found.table((0,) * len(found.members.choices)) <= min(limits):
            break  # what is smaller still than a whole that keeps every budget has nothing to offer
    if not built:
        raise BudgetError(
            f"no way of storing weights has a member for every budget: the smallest member takes "
            f"{least / source.bytes_bf16():.2f}x; raise the budget, or allow smaller formats by --methods"
        )
    best = min(built, key=lambda one: one[0])[1]
    picks = [best.best(limit, wanted.further, wanted.seed + 1) for limit in limits]
    subnets = [best.members.subnet(genes) for genes in picks if genes is not None]
    named = {name_of(budget): subnet for budget, subnet in zip(budgets, subnets, strict=True)}
    original = host_of(source.path).outputs(
        source.path, [{"input_ids": batch.ids_BT} for batch in texts.evaluation.batches(TRIED)]
    )
    figures = quality(
        texts.evaluation, original, [best.model, *(member(best.model, one) for one in subnets)], wanted.seed
    )
    records = [
        MemberRecord(
            name=name,
            subnet=str(subnet),
            budget=text,
            bytes=int(best.table(genes)),
            ratio=best.table(genes) / source.bytes_bf16(),
            quality=found,
        )
        for (name, subnet), text, genes, found in zip(
            [("full", ""), *named.items()],
            ["", *(budget.text for budget in budgets)],
            [(0,) * len(best.members.choices), *(genes for genes in picks if genes is not None)],
            figures,
            strict=True,
        )
    ]
    chosen = Chosen(
        source=str(source.path),
        weights=best.name,
        members=tuple(records),
        measured=len(best.measured.losses),
        tried={one.name or "full precision": round(loss, 4) for loss, one in built},
        notes=tuple(notes),
    )
    finish(best.folder, replace(best.members.family, members=named), chosen)
    return chosen, best.folder


def _built(source: Source, weights: str, wanted: Wanted, texts: Texts, at: tuple[Path, Trials]) -> Built:
    folder, trials = at
    plan = load("family" if not weights else f"family+{weights}")
    plan = _offering(plan, source.anatomy)
    host = host_of(source.path)
    apply(
        plan,
        source.path,
        folder,
        calibration=list(texts.calibration),
        tokens=texts.tokens,
        length=texts.length,
        seed=wanted.seed,
        embed=EMBED if weights else None,
        force=True,
    )
    model = host.load(folder, dtype=torch.float32)
    members = Members.of(model.regauge.family, model.regauge.anatomy)
    table = Table.of_bytes(members, stored(opened(folder).layout), folder)
    measured = Measured(lambda genes: trials.kl(member(model, members.subnet(genes))))
    return Built(weights, folder, model, members, table, measured)


def _offering(plan: Plan, anatomy: Anatomy) -> Plan:
    """The plan with a family of many choices, of whatever this model admits."""
    blocks = anatomy.blocks
    groups = max((stream.size for stream in anatomy.streams if stream.kind == "heads"), default=0)
    offers: dict[str, Any] = {
        "depth": tuple(range(blocks - 1, (blocks - 1) // 2, -1)),
        "ffn": FFN,
        "heads": tuple(range(groups - 1, (groups - 1) // 2, -1)),
    }
    admitted = {name: some for name, some in offers.items() if some and not reasons(Family(**{name: some}), anatomy)}
    if not admitted:
        raise RegaugeError("this model has no members: no block, neuron or head of it can be left out")
    return replace(plan, name="members", family=Family(**admitted, layers=RANKED if blocks > 1 else "equidistant"))
