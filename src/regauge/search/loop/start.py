"""The steps before any decision: what is refused at once, rounding, sensitivity, first true KLs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from regauge.amounts import told
from regauge.artifact.disk import check_disk
from regauge.errors import BudgetError
from regauge.hosts import host_of
from regauge.hosts.base import Inputs, Source
from regauge.kernels.cpu.machine import cpus
from regauge.measure.reading import numbers
from regauge.measure.subject import Facts
from regauge.search.allocation import Candidate, least
from regauge.search.budgets import Budget
from regauge.search.loop import room as memory
from regauge.search.loop.build import cache_at
from regauge.search.loop.desk import TURNS, Ask, Desk, Effort
from regauge.search.loop.forecast import seconds, variants, work_folder
from regauge.search.loop.outlook import outlook
from regauge.search.loop.problem import Problem, read_ledger
from regauge.search.losses.borders import Borders
from regauge.search.losses.fisher import Losses, fisher
from regauge.search.losses.shelf import Shelf
from regauge.search.losses.stock import Stock
from regauge.search.menus import groups_of
from regauge.search.options import SiteGroup, group_bytes
from regauge.search.profile import within_reach
from regauge.search.record import Run
from regauge.search.stores import store_bytes, store_groups, whole_bytes, why_not_read
from regauge.search.subject import Subject, predicting
from regauge.version import __version__

LONG = 1024
"""Tokens of a window, where a cache is chosen and the model reads as many."""
WINDOWS = 4
"""Windows of the search text then."""


def fixed_bytes(source: Source, groups: Sequence[SiteGroup], itemsize: int) -> int:
    """Bytes that no choice changes: norms, biases, and what the search leaves alone."""
    chosen = sum(site.shape[0] * site.shape[1] for group in groups for site in group.sites)
    return (source.parameters() - chosen) * itemsize


def with_caches(ask: Ask, source: Source) -> Ask:
    """The same with what blocks keep of the past to choose from, where a budget counts it and attention can be made to
    read it; on longer windows then, and more of them, for a cache is read behind some text."""
    contexts = sorted({budget.context for budget in ask.budgets if budget.context is not None}, reverse=True)
    stores = [group for group in store_groups(source.anatomy, tuple(contexts)) if group.block is not None]
    if not stores or not ask.menu.caches or ask.cache is not None:
        return ask
    block = min(group.block for group in stores if group.block is not None)
    if why := why_not_read(source, host_of(source.path).runner(source), block):
        return replace(ask, notes=(*ask.notes, f"the cache stays as it is: {why}"))
    length = ask.length or min(LONG, contexts[0], host_of(source.path).context(source) or LONG)
    menu = replace(ask.menu, contexts=tuple(contexts))
    effort = replace(ask.effort, search=max(ask.effort.search, WINDOWS * length))
    given = {**ask.given, **menu.record, "length": length}
    return replace(ask, menu=menu, length=length, given=given, effort=effort)


def reachable(source: Source, groups: Sequence[SiteGroup], budgets: Sequence[Budget], cache: str | None = None) -> None:
    """Refuses a memory budget that no allocation can meet, before any work.

    Args:
        cache: the recipe that the artifact's cache will be kept by; None: as bf16.

    Raises:
        BudgetError: says how near one can come.
        RecipeError: there is no such cache, or it does not fit the model.
    """
    cache_at(source, cache, 0)
    itemsize = source.dtype.itemsize
    sizes = [
        [Candidate(0.0, {"bytes": float(group_bytes(group, o, itemsize))}) for o in group.options] for group in groups
    ]
    floor = least(sizes, "bytes") + fixed_bytes(source, groups, itemsize)
    whole = source.bytes_bf16()
    for budget in budgets:
        if budget.resource != "memory":
            continue
        limit, held = budget.bytes(whole), cache_at(source, cache, budget.context or 0)
        if budget.context is not None:
            stores, at = [group for group in groups if group.store is not None], budget.context
            held -= whole_bytes(stores, at)
            held += sum(min(store_bytes(group, option, at) for option in group.options) for group in stores)
        if budget.beside(held, whole) < floor:
            beside = f" beside a cache of {held:,}" if held else ""
            raise BudgetError(
                f"{budget.text!r} allows {limit:,} bytes, and the smallest that we can make is {floor:,.0f}{beside} "
                f"({(floor + held) / whole:.3f}x of the source counted as bf16); ask for that or more."
            )


def estimate(source: Source, ask: Ask, bound: int | None = None) -> Run:
    """What `fit` would do: a record without points, whose notes say what it would read, try and need.

    Raises:
        BudgetError: it needs more memory than the bound, or a speed that is asked for cannot be had.
        ModelError: there is no tokenizer.
    """
    effort, groups = ask.effort, groups_of(source.anatomy, ask.menu)
    if (facts := predicting(source)) is not None:
        return _dry(source, ask, _imaged(groups, effort, facts))
    source.tokenizer()  # without one no text can be read, which the search would find out first
    within_reach(Subject.of(source), groups, ask.budgets, TURNS, ask.drafting)
    options = sum(len(group.options) for group in groups)
    singles, wholes = variants(effort)
    space = memory.room(source, groups, effort, ask.budgets, ask.length)
    limits = space.limits(bound)
    notes = (
        f"{len(groups)} choices of {options} options in all; about {told(work_folder(source, groups, effort))} of "
        f"work folder while it runs, and {memory.told(space, limits)}",
        f"passes: one forward over {effort.seen:,} calibration tokens and one backward over {effort.gradient:,}, one "
        f"that rounds what may win, then up to {singles} variants of one site and {wholes} of more over "
        f"{effort.search:,} tokens, the artifact over {effort.calibration:,}, and {effort.evaluation:,} tokens for the "
        "final figures",
        f"about {seconds(source, groups, effort):.0f} s with {torch.get_num_threads()} threads on the {cpus()} CPUs "
        "that this process may use: an estimate from products and roundings timed here",
        str(outlook(source, groups, ask, float(fixed_bytes(source, groups, source.dtype.itemsize)))),
    )
    return _dry(source, ask, notes)


def _imaged(groups: Sequence[SiteGroup], effort: Effort, facts: Facts) -> tuple[str, ...]:
    """What a search of a model of images would do; how long it takes is not foreseen."""
    options = sum(len(group.options) for group in groups)
    singles, wholes = variants(effort)
    return (
        f"{len(groups)} choices of {options} options in all",
        f"passes: one forward over {effort.seen:,} images and one backward over {effort.gradient:,}, one that rounds "
        f"what may win, then up to {singles} variants of one matrix and {wholes} of more over {effort.search:,} "
        f"images, the artifact over {effort.calibration:,}, and {effort.evaluation:,} at most for the final figures",
        f"KL is of {facts.gives}; how long it takes is not foreseen",
    )


def _dry(source: Source, ask: Ask, notes: tuple[str, ...]) -> Run:
    return Run(
        regauge=__version__,
        command="",
        seed=ask.seed,
        source=ask.model,
        source_hash="",
        family=source.anatomy.family,
        parameters=source.parameters(),
        bytes_bf16=source.bytes_bf16(),
        budgets=ask.budgets,
        floor=dict(ask.floors),
        texts=(),
        points=(),
        chosen=-1,
        chosen_why="dry run: nothing was searched",
        notes=notes,
    )


def begin(desk: Desk) -> Problem:
    """The backward pass done: what every option is predicted to cost. Nothing is rounded whole yet."""
    subject, folder, effort = desk.subject, desk.folder, desk.ask.effort
    source, groups = subject.source, groups_of(subject.anatomy, desk.ask.menu)
    check_disk(folder.path, work_folder(source, groups, effort))
    shelf = Shelf(folder.path, groups)

    def show(step: str, share: float) -> None:
        desk.clock.show(step, int(100 * share), 100)

    inputs = desk.texts.batches(effort.seen, subject.batch)
    borders = Borders(subject, inputs, folder.path, show)
    predicted = folder.load("fisher.json")
    if predicted is None:
        with desk.watch.step("sensitivity"):
            keep, at_once = backward(inputs, effort.gradient), desk.limits.at_once
            predicted = fisher(borders, groups, keep, desk.ask.seed, show, at_once)
            folder.save("fisher.json", predicted)
    else:
        desk.clock.say("sensitivity", f"going on from what an earlier run found, in {folder.path}")
    return Problem(
        subject=subject,
        shelf=shelf,
        windows=desk.texts.search,
        predicted=_losses(predicted),
        fixed=float(fixed_bytes(source, groups, subject.itemsize)),
        folder=folder,
        kept=read_ledger(folder),
        say=desk.clock.show,
        ready=Stock(shelf, borders, desk.limits.at_once),
        release=borders.drop,
        states=desk.limits.states,
    )


def backward(inputs: Inputs, tokens: int) -> int:
    """How many batches go backward: so many tokens, and half of what there is at the most, but one at the least."""
    return max(1, min(len(inputs), -(-tokens // numbers(inputs[0]))))


def _losses(found: object) -> Losses:
    assert type(found) is dict, "written by this module"
    return {str(group): {str(o): float(loss) for o, loss in options.items()} for group, options in found.items()}
