"""`fit`, the main job: search, build, measure, correct, until every budget is met by measurement; and `pick`.

    run = fit("path/or/hub-id", "OUT", budgets=["memory=0.30x"], calibration="novels/")
    pick("OUT", 3, "OUT2")

Steps: three texts; one backward pass that predicts what every option costs, from some rows of each matrix; the options
that may win rounded whole; true KL of single changes where the decision hangs on them; allocations by mixed-integer
program; whole allocations compared by true KL; the winner built by the engine, loaded, measured; limits corrected by
what was measured. The model is read block by block throughout. What was rounded and measured
lies in `OUT.search/` until OUT is whole, so a run that was killed goes on from there.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from regauge.amounts import told
from regauge.artifact.config import CARRIED
from regauge.artifact.disk import one_sentence
from regauge.artifact.ownership import refuse_out, remove, replaced, search_folder, tidy
from regauge.artifact.receipt import Receipt
from regauge.engine.watchdog import Clock, Watcher, nobody, quiet_torch
from regauge.errors import ArtifactError, BudgetError, ResumeError
from regauge.hosts import host_of
from regauge.search import budgets as written
from regauge.search import drafting, menus, record
from regauge.search import pictures as images
from regauge.search.given import absolute, spell, unspell
from regauge.search.kept import DONE, Folder, sweep
from regauge.search.loop.build import plan_for
from regauge.search.loop.desk import Ask, Desk, Effort, Limits, Stopwatch
from regauge.search.loop.finish import assemble
from regauge.search.loop.forecast import NEEDED, NOMINAL, Time, paced, steps, within
from regauge.search.loop.goal import weights
from regauge.search.loop.recovering import recovered
from regauge.search.loop.room import room as space
from regauge.search.loop.settle import settle
from regauge.search.loop.start import begin, estimate, reachable, with_caches
from regauge.search.profile import timed, within_reach
from regauge.search.record import Run
from regauge.search.resuming import as_begun, identity
from regauge.search.subject import Subject, predicting, reader
from regauge.text.corpora import Where
from regauge.text.length import enough_for
from regauge.text.split import Sizes


def fit(
    model: str | Path,
    out: str | Path,
    budgets: Sequence[str] = (),
    floor: str | None = None,
    calibration: Where | None = None,
    eval: Where | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Watcher | None = None,
    command: str = "",
    max_memory: int | None = None,
    spent: float = 0.0,
    for_: str | None = None,
    methods: str | Sequence[str] | None = None,
    tokens: int | None = None,
    length: int | None = None,
    cache: str | None = None,
    recover: float | None = None,
    drafts: str | None = None,
) -> Run:
    """Finds, builds and measures the cheapest form of a model within budgets.

    Args:
        budgets: `memory=0.30x`, `memory=2GB`, `memory@32k=3GB` (with the cache, whose formats are chosen too),
            `decode=1.5x`, `prefill=1.2x`. None: the knee.
        floor: `kl=0.05`: no worse than, nats a token.
        calibration, eval: text; see `split.prepare` for what happens where one is not given.
        time_limit: seconds; as much is tried as there is time for, and what was left out is told.
        spent: seconds of it that are over already, at the most half of it.
        max_memory: bytes that the process may take at its highest; less is done at once then, and comes out the same.
        for_: `vllm`, `transformers`, `sglang`: only what that loads is chosen from.
        methods: `gptq-w4g128,rtn-w8` or a list: only what these presets make of a matrix is chosen from.
        tokens, length: how much calibration text is read, and in windows of which length; None: as the model's size
            has it.
        cache: a preset or recipe file of what the artifact keeps of the past; a budget at a context counts it.
        recover: seconds, beyond `time_limit`, in which the artifact is trained towards the original; None: it is not.
        drafts: `any`, `lookup` or `none`: what may draft where the artifact is decoded; None: `any` where a budget is
            of decoding.

    Raises:
        RecipeError, SettingError: there is no such method or runtime, or together they leave nothing to choose from.
        BudgetError: a budget is malformed, or out of reach; says how near it came. Or the time does not suffice.
        RegaugeError: any other refusal, before any work.
    """
    clock, target = Clock(progress or nobody), Path(out).expanduser().absolute()
    before = min(spent, (time_limit or 0.0) / 2)
    watch = Stopwatch(time_limit, clock, began=time.monotonic() - before)
    asked = written.parse(budgets)
    wanted = drafting.asked(drafts, asked, calibration is not None or eval is not None)
    drafting.alone(wanted)
    allowed = menus.parse(for_, methods)
    ask = Ask(
        model=absolute(str(model)),
        budgets=asked,
        floors=written.parse_floor(floor),
        effort=Effort.most(),
        seed=seed,
        command=command or _command(),
        given={"calibration": spell(calibration), "eval": spell(eval), "revision": revision, "length": length}
        | {"cache": None if cache is None else absolute(cache)}
        | allowed.record,
        menu=allowed,
        length=length,
        cache=cache,
        drafts=wanted,
    )
    tidy(target)
    sweep(target)
    refuse_out(target, force, CARRIED)
    with quiet_torch():
        clock.say("open")
        source = host_of(model).open(model, revision)
        facts = predicting(source)
        if facts is not None:
            more = {"time": time_limit, "max-memory": max_memory, "cache": cache, "recover": recover, "length": length}
            images.refuse(source.path.name, asked, more | {"drafts": wanted})
        ask = with_caches(ask, source)
        allowed, length = ask.menu, ask.length
        groups, speeds = menus.groups_of(source.anatomy, allowed), bool(timed(ask.budgets))
        effort = ask.effort.sized(source.parameters()).calibrating(tokens)
        reachable(source, groups, ask.budgets, cache)
        if facts is None:
            enough_for(tokens, reader(source, seed, length).length)
        else:
            effort = effort.imaged(images.sizes_of(facts, tokens))
        rates, threads = (NOMINAL, None) if time_limit is None else paced(source)
        if time_limit is not None:
            effort = within(source, groups, effort, Time(time_limit - watch.elapsed, time_limit, rates, speeds))
        ask = dataclasses.replace(ask, effort=as_begun(effort, target, source, seed))
        if dry_run:
            return estimate(source, ask, max_memory)
        limits = Limits()
        if facts is None:
            limits = space(source, groups, ask.effort, ask.budgets, length).limits(max_memory)
    with quiet_torch(threads), search_folder(target) as room:
        subject = Subject.of(source)
        if facts is None:  # what images take is not foreseen
            expected = steps(source, groups, ask.effort, rates, speeds)
            bare = steps(source, groups, ask.effort.needed(), rates, speeds)
            clock.ahead(expected if recover is None else {**expected, "recover": recover})
            watch.expects(expected, {name: bare[name] for name in NEEDED})
        with watch.step("profile"):
            timing = within_reach(subject, groups, ask.budgets, ask.effort.turns, ask.drafting)
        with watch.step("text"):
            texts = images.material(source, facts, (calibration, eval), ask.sizes, (seed, length))
        folder = Folder.open(room, identity(ask, source, texts), force, time_limit)
        run = search(Desk(ask, subject, texts, folder, timing, clock, watch, limits, facts), target, force, recover)
        if watch.left_out:
            folder.save(DONE, False)  # what was found stays for a run with more time
        else:
            folder.leave()
        clock.say("finish", f"{out} is written")
    return run


def search(desk: Desk, target: Path, force: bool, recover: float | None = None) -> Run:
    """The search itself, on a desk that is laid; its artifact goes to `target`. What lies in the folder stays."""
    found = settle(desk, begin(desk))
    if recover is not None:
        found = recovered(desk, found, recover)
    run = assemble(desk, found)
    record.write(run, found.built.folder)
    drafting.write(desk.subject.source, found.built.folder, found.drafts, weights(found.speeds))
    desk.folder.save(DONE, True)
    move(found.built.folder, target, force)
    return run


def pick(
    run: str | Path,
    index: int | None,
    out: str | Path,
    force: bool = False,
    progress: Watcher | None = None,
    budget: str | None = None,
) -> Receipt:
    """Builds another point of the frontier that `fit` found, from the same text, without searching again.

    Args:
        index: which point; None: the best within `budget`.
        budget: `memory=0.25x` or `memory=2GB`.

    Raises:
        ArtifactError: `run` holds no record, or there is no such point.
        BudgetError: no point keeps the budget, or it is not of memory; says how near one comes.
        ResumeError: the source or the text is not what the search read.
    """
    from regauge.engine import apply

    found = record.read(run)
    index = _within(found, budget) if index is None else index
    if not 0 <= index < len(found.points):
        raise ArtifactError(
            f"{run} has points 0 to {len(found.points) - 1}, and you asked for {index}; `regauge report` shows them."
        )
    tidy(Path(out).expanduser().absolute())
    refuse_out(Path(out).expanduser().absolute(), force, CARRIED)
    given = record.given(found, run)
    with quiet_torch():
        source = host_of(found.source).open(found.source, given.revision)
        if source.digest() != found.source_hash:
            raise ResumeError(f"{found.source} has changed since the search; run fit again.")
        names = {field.name for field in fields(Sizes)}
        if given.sizes.keys() != names or min(given.sizes.values()) < 1:
            raise ArtifactError(f"the record in {run} cannot be picked from: its sizes are not of {sorted(names)}.")
        where = unspell(given.calibration), unspell(given.eval)
        texts = images.material(source, predicting(source), where, Sizes(**given.sizes), (found.seed, given.length))
        if [text.sha256 for text in found.texts[:1]] != [texts.records[0].sha256]:
            raise ResumeError("the calibration text has changed since the search; run fit again.")
        point = found.points[index]
        menu = menus.Menu(given.target, given.methods, given.contexts)
        plan = plan_for(point.picks, menus.groups_of(source.anatomy, menu), point.name, texts)
        return apply(
            plan,
            source.path,
            out,
            **texts.given,
            seed=found.seed,
            force=force,
            wire=menu.wire,
            cache=given.cache,
            progress=progress,
        )


def _within(found: Run, budget: str | None) -> int:
    """The point with the least KL whose artifact keeps a budget of memory."""
    if budget is None:
        raise BudgetError("say which: a point's number, or --budget memory=0.25x for the best that keeps it.")
    asked = written.parse_one(budget)
    if asked.resource != "memory" or asked.context is not None:
        raise BudgetError(f"{budget!r} is not of the artifact's own memory; points are picked by memory=0.25x or 2GB.")
    limit = asked.bytes(found.bytes_bf16)
    sizes = [point.bytes_measured or point.bytes_predicted for point in found.points]
    fits = [index for index, size in enumerate(sizes) if size <= limit]
    if not fits:
        raise BudgetError(f"no point keeps {budget!r}, which is {told(limit)}: the smallest takes {told(min(sizes))}.")
    return min(fits, key=lambda index: (found.points[index].kl_predicted, sizes[index]))


def move(folder: Path, target: Path, force: bool) -> None:
    """The finished artifact into its place by one rename; an old one is put aside first and removed after."""
    old = replaced(target)
    refuse_out(target, force, CARRIED)
    with one_sentence("writing", target):
        if target.exists():
            remove(old)
            target.rename(old)
        folder.rename(target)
        remove(old)


def _command() -> str:
    return " ".join(Path(word).name if place == 0 else word for place, word in enumerate(sys.argv))
