"""`fit --members`: one artifact, and for each budget the best member of it that was found, by measurement.

Each way of storing the weights that may serve is built once, sorted, as a family of many choices. Members are searched
by `evolution`, what they take by the formats (memory) or by products timed here (decode, prefill), what they lose by
true KL on a text. The way whose members lose least over all budgets (sum of logarithms) is taken, searched further, and
its members get names: `m0.50x` is what `memory=0.50x` asked for. Speeds are measured as members run, and a member that
misses its budget by measurement is searched for anew under a tighter one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from regauge.artifact.config import CARRIED
from regauge.artifact.ownership import refuse_out, search_folder, tidy
from regauge.elastic.family import Family
from regauge.elastic.legal import settled
from regauge.elastic.subnet import Subnet
from regauge.engine.drafting import LOOKUP, refused
from regauge.engine.watchdog import Clock, Watcher, nobody, quiet_torch
from regauge.errors import BudgetError, RecipeError, RegaugeError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.reading import Read, inputs_of
from regauge.measure.subject import Outputs
from regauge.search import drafting
from regauge.search import pictures as images
from regauge.search.budgets import Budget
from regauge.search.evolution import Genes
from regauge.search.fit import move
from regauge.search.kept import Folder
from regauge.search.members.build import Built, Goal, built, offered
from regauge.search.members.gaining import gained
from regauge.search.members.normed import anew, kept
from regauge.search.members.record import Chosen, MemberRecord, finish, name_of, record
from regauge.search.members.timing import Pace, pace_of
from regauge.search.members.trials import TOKENS as BATCH
from regauge.search.members.trials import Trials, member, quality
from regauge.search.members.wanted import TOKENS, Wanted, asked
from regauge.search.subject import predicting
from regauge.text.split import Sizes, Texts

TURNS, TIGHTER = 5, 3
"""Rounds of a timing; times that a member which misses its speed is searched for anew."""


def fit_members(model: str | Path, out: str | Path, wanted: Wanted, progress: Watcher | None = None) -> Chosen:
    """Searches, builds and measures a family with a member for each budget.

    Raises:
        BudgetError: a budget is malformed, none is given, or out of reach; says how near it came.
        RegaugeError: any other refusal.
    """
    clock, target = Clock(progress or nobody), Path(out).expanduser().absolute()
    budgets = asked(wanted.budgets)
    text = wanted.calibration is not None or wanted.eval is not None
    drafts = drafting.asked(wanted.drafts, budgets, text)
    tidy(target)
    refuse_out(target, wanted.force, CARRIED)
    with quiet_torch():
        clock.say("open")
        source = host_of(model).open(model, wanted.revision)
        facts = predicting(source)
        if facts is not None:
            images.refuse(source.path.name, budgets, {"length": wanted.length, "drafts": drafts})
        _known(drafts, budgets, source)
        sizes = Sizes(wanted.tokens or TOKENS, 4096, 12288)
        if facts is not None:
            amounts = images.sizes_of(facts, wanted.tokens)
            sizes = Sizes(amounts["calibration"], amounts["search"], amounts["evaluation"])
        given = wanted.calibration, wanted.eval
        texts = images.material(source, facts, given, sizes, (wanted.seed, wanted.length))
        vocabulary = 1 if facts is not None else source.anatomy.site("embed").shape[0]
        trials = Trials(texts.search, _outputs(source, texts.search, Trials.batch(vocabulary)), vocabulary)
        with search_folder(target) as room:
            folder = Folder.open(room, _identity(source, wanted, texts), wanted.force)
            try:
                pace = pace_of(source) if any(one.resource != "memory" for one in budgets) else None
                best, notes, tried = _ways(source, budgets, wanted, texts, (room, trials, pace, clock))
                chosen = _chosen(source, best, wanted, texts, trials, [*texts.notes, *notes])
                chosen = chosen.model_copy(update={"tried": tried})
                named = {one.name: Subnet.parse(one.subnet) for one in chosen.members[1:]}
                family = replace(best.members.family, members=named)
                finish(best.folder, family, chosen)
                if drafts and isinstance(texts, Texts):
                    clock.say("drafts")
                    chosen = _drafted(source, best.folder, family, texts, (drafts, text), chosen)
            except RegaugeError:
                folder.leave()
                raise
            move(best.folder, target, wanted.force)
            folder.leave()
        clock.say("finish", f"{out} is written")
    return chosen


def _identity(source: Source, wanted: Wanted, texts: images.Material) -> dict[str, object]:
    """What a search that goes on must have in common with the one that was killed: families that were built stay."""
    read = [text.sha256 for text in texts.records]
    return {"members": True, "source": source.digest(), "texts": read, "seed": wanted.seed, "ways": list(wanted.ways)}


def _ways(
    source: Source,
    budgets: Sequence[Budget],
    wanted: Wanted,
    texts: images.Material,
    at: tuple[Path, Trials, Pace | None, Clock],
) -> tuple[Built, list[str], dict[str, float]]:
    """The way of storing weights whose members lose least, what is to be told, and what each lost."""
    room, trials, pace, clock = at
    kept: list[tuple[float, Built]] = []
    notes, near = list[str](), ""
    for number, name in enumerate(wanted.ways):
        clock.say("search", f"{name or 'full precision'}: building")
        try:
            found = built(source, name, wanted, texts, budgets)(room / f"family-{number}", trials, pace)
        except RecipeError as error:
            notes.append(f"{name} is not among what was tried: {error}")
            continue
        loss, near = found.loss(wanted.first, wanted.seed), found.nearest() or near
        clock.say("search", f"{name or 'full precision'}: {len(found.measured.losses)} members measured")
        if loss < math.inf:
            kept.append((loss, found))
        if all(goal.table(found.whole) <= goal.limit for goal in found.goals):
            break  # what is smaller still than a whole that keeps every budget has nothing to offer
    if not kept:
        raise BudgetError(
            f"no way of storing weights has a member for every budget ({near or '; '.join(notes)}); raise the budget, "
            "or allow smaller formats by --methods"
        )
    tried = {one.name or "full precision": round(loss, 4) for loss, one in kept}
    return min(kept, key=lambda one: one[0])[1], notes, tried


def _chosen(
    source: Source, best: Built, wanted: Wanted, texts: images.Material, trials: Trials, notes: list[str]
) -> Chosen:
    """A member for each goal, measured."""
    picks = [best.whole, *(_pick(best, goal, wanted, notes) for goal in best.goals)]
    subnets = [best.members.subnet(genes) for genes in picks]
    names = ["full", *(name_of(goal.budget) for goal in best.goals)]
    if isinstance(texts, Texts):
        notes += gained(best, subnets[1:], texts.windows_NT, trials)
    for subnet in subnets[1:]:
        anew(best.model, subnet, texts)
    kept(best.folder, best.model, subnets[1:], texts)
    original = _outputs(source, texts.evaluation, BATCH)
    figures = quality(texts.evaluation, original, [member(best.model, one) for one in subnets], wanted.seed)
    speeds = [{} if best.timed is None else best.timed.ratios(one, TURNS) for one in subnets]
    members = [
        MemberRecord(
            name=name,
            subnet="" if subnet.full else str(subnet),
            budget=text,
            bytes=int(best.bytes(genes)),
            ratio=best.bytes(genes) / source.bytes_bf16(),
            quality=found,
            speeds=speed,
        )
        for name, subnet, text, genes, found, speed in zip(
            names, subnets, ["", *(goal.budget.text for goal in best.goals)], picks, figures, speeds, strict=True
        )
    ]
    return Chosen(
        source=str(source.path),
        weights=best.name,
        members=tuple(members),
        measured=len(best.measured.losses),
        notes=tuple(notes),
    )


def _outputs(source: Source, text: Read, tokens: int) -> Outputs:
    """What the original gives for a text or images."""
    given = inputs_of(text, tokens)
    batches = [{"input_ids": one} if isinstance(one, torch.Tensor) else dict(one) for one in given]
    return host_of(source.path).outputs(source.path, batches)


def _known(drafts: Sequence[str], budgets: Sequence[Budget], source: Source) -> None:
    """
    Raises:
        SettingError: what is to draft is no member that there will be; the sentence names the nearest that is.
    """
    for name in drafts:
        if name not in (drafting.ANY, LOOKUP, *map(name_of, budgets)):
            settled(name, offered(source.anatomy), source.anatomy)


def _drafted(
    source: Source, folder: Path, family: Family, texts: Texts, asked: tuple[tuple[str, ...], bool], chosen: Chosen
) -> Chosen:
    """What may draft for the whole: look-up, the members that were chosen, and the depths that are offered."""
    wanted, text = asked
    if not text:
        found = refused("no text was given that would tell how often guesses are right")
    else:
        names = [one.name for one in chosen.members[1:] if one.subnet]
        names += [f"depth={one}" for one in family.depth if f"depth={one}" not in {m.subnet for m in chosen.members}]
        found = drafting.found(source, folder, texts, wanted, names)
        drafting.write(source, folder, found, chosen.members[0].speeds.get("decode"))
    chosen = chosen.model_copy(update={"drafts": found})
    record(folder, chosen)
    return chosen


def _pick(best: Built, goal: Goal, wanted: Wanted, notes: list[str]) -> Genes:
    """The best member for a goal; one that misses its speed as measured is searched for anew, under a tighter limit."""
    limit, found = goal.limit, best.whole
    for _ in range(TIGHTER):
        genes = best.best(goal, limit, wanted.further, wanted.seed + 1)
        if genes is None:
            break
        found = genes
        if best.timed is None or goal.budget.resource == "memory":
            return found
        ratio = best.timed.ratios(best.members.subnet(found), TURNS)[goal.budget.resource]
        if ratio >= goal.budget.amount:
            return found
        limit *= ratio / goal.budget.amount
    notes.append(f"{goal.budget.text} is missed as measured; the member is the fastest that was tried")
    return found
