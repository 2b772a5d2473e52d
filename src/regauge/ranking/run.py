"""`compare`: rows of methods on one model and text, each made, scored and let go; what the store has is not done again.

Cost: that of each row that is missing (`bench.py`); one artifact at a time lies on disk. Peak memory: that of `apply`,
then that of measuring.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from regauge.artifact.disk import one_sentence, take_lock
from regauge.engine.api import apply
from regauge.engine.watchdog import Clock, Progress, Watcher, nobody, quiet_torch
from regauge.errors import ExactnessError, MoveError, RecipeError, RefusedError, RegaugeError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.bootstrap import Floats
from regauge.plan import Plan, digest, parse
from regauge.ranking.bench import Bench, Given, identity, made, opened
from regauge.ranking.null import null
from regauge.ranking.record import Rank, Ranking, Result, Row, Standing, against
from regauge.ranking.settings import ALL, Entry, Setting, chosen, known, setting_of
from regauge.ranking.store import Store, key_of
from regauge.ranking.worth import deciding, pools, wins, worths

LOCK = ".lock"
FOLDER = "compare"
OF_THE_ROW = (RecipeError, MoveError, RefusedError, ExactnessError)
"""What is wrong with one row on this model, and is told beside the others; all else ends the run."""


def compare_methods(
    model: str | Path,
    methods: str | Sequence[str] = ALL,
    at: str | Sequence[str] | None = None,
    given: Given = Given(),  # noqa: B008  # frozen
    folder: Path = Path(FOLDER),
    progress: Watcher | None = None,
) -> Standing:
    """Rows of methods side by side; results are kept in `folder` as they come.

    Args:
        methods, at: see `settings.chosen`.

    Raises:
        RegaugeError: any refusal that is not about one row alone; or every row was refused.
    """
    clock = Clock(progress or nobody)
    entries = chosen(methods, at)
    with one_sentence("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), Store.open(folder) as store, quiet_torch():
        clock.say("open")
        source = host_of(model).open(model, given.revision)
        if given.planted:
            source = _planted(source, folder, given.seed, clock)
        bench = opened(source, str(model) + (" (planted)" if given.planted else ""), given)
        done, refused, count = _results(entries, bench, store, folder, progress or nobody)
        if not done:
            raise next(iter(refused.values()))
        everything = store.all()
    rows = _rows(entries, done, given.seed)
    return Standing(
        model=bench.name,
        read=bench.windows.description,
        tokens=bench.windows.predicted,
        rows=rows,
        rankings=tuple(ranked(everything, setting) for setting in dict.fromkeys(row.result.setting for row in rows)),
        refused={name: str(error) for name, error in refused.items()},
        made=count,
        notes=() if given.eval is not None else ("no text was given to score: the model sampled it from itself",),
        folder=str(folder),
    )


def ranked(results: Sequence[Result], setting: str) -> Ranking:
    """The ranking of one setting over every model and text that a store has results of."""
    groups: dict[Hashable, dict[str, Floats]] = {}
    called: dict[Hashable, str] = {}
    for one in (result for result in results if result.setting == setting):
        groups.setdefault(one.group, {})[one.method] = one.windows.kl_W
        called[one.group] = one.name
    methods = sorted({method for scores in groups.values() for method in scores})
    total = sum((wins(scores, methods) for scores in groups.values()), np.zeros((len(methods), len(methods))))
    found: list[tuple[Rank, ...]] = []
    for pool in pools(total):
        log_M = worths(total[np.ix_(pool, pool)])
        order = sorted(range(len(pool)), key=lambda i: -log_M[i])
        found.append(
            tuple(
                Rank(
                    method=methods[pool[i]],
                    place=place,
                    strength=round(float(log_M[i]), 6),
                    runs=sum(methods[pool[i]] in scores for scores in groups.values()),
                )
                for place, i in enumerate(order, 1)
            )
        )
    run = deciding(groups, methods)
    return Ranking(
        setting=setting,
        runs=len(groups),
        pools=tuple(found),
        next=None if run is None else (run[0], called[run[1]]),
    )


def _rows(entries: Sequence[Entry], done: dict[str, Result], seed: int) -> tuple[Row, ...]:
    """By setting, in it by KL; a null that nobody asked for is a row of its own as well."""
    rows = [against(one, done[one.null], seed) if one.null in done else Row(result=one) for one in done.values()]
    order = list(dict.fromkeys(str(entry.setting) for entry in entries))
    return tuple(sorted(rows, key=lambda row: (order.index(row.result.setting), row.result.quality.kl.value)))


def _results(
    entries: Sequence[Entry], bench: Bench, store: Store, folder: Path, watch: Watcher
) -> tuple[dict[str, Result], dict[str, RegaugeError], int]:
    """Digest of the recipe → result, of methods and nulls; what was refused; how many were made now."""
    wanted: dict[str, tuple[str, Plan, Setting, str]] = {}
    others = [null(entry.plan) for entry in entries]
    for entry, other in zip(entries, others, strict=True):
        wanted[digest(entry.plan)] = (entry.name, entry.plan, entry.setting, "" if other is None else digest(other))
    for entry, other in zip(entries, others, strict=True):
        if other is not None and setting_of(other) == entry.setting:
            wanted.setdefault(digest(other), (_called(other), other, entry.setting, ""))
    done: dict[str, Result] = {}
    refused: dict[str, RegaugeError] = {}
    count = 0
    for number, (recipe, (name, plan, setting, base)) in enumerate(wanted.items()):
        watch(Progress("compare", number, len(wanted), message=name))
        key = key_of(identity(bench, recipe))
        found = store.get(key)
        if found is None:
            try:
                found = made(bench, plan, (name, recipe, str(setting), base), folder / f"making-{key[:12]}", watch)
            except RegaugeError as error:
                if not isinstance(error, OF_THE_ROW) and type(error) is not RegaugeError:  # which lists several
                    raise
                refused[name] = error
                continue
            store.put(key, found, time.time())
            count += 1
        done[recipe] = found.model_copy(update={"method": name, "name": bench.name, "null": base})
    watch(Progress("compare", len(wanted), len(wanted)))
    return done, refused, count


@cache
def _by_digest() -> dict[str, str]:
    return {digest(entry.plan): entry.name for entry in known()}


def _called(plan: Plan) -> str:
    """What a null is called: the preset that it is, or its first format."""
    same = _by_digest().get(digest(plan))
    if same is not None:
        return same
    point = next(rule.point for rule in plan.rules if rule.point is not None)
    grain = point.spec("grain")
    size = dict(grain.options).get("size", "")
    inputs = "" if not plan.of("inputs") else f" {setting_of(plan)}"
    return f"nearest {point.name('grid')} {grain.part}{f':{size}' if size else ''}{inputs}"


def _planted(source: Source, folder: Path, seed: int, clock: Clock) -> Source:
    """The model's planted form, made in the folder where it is not there yet; the same bytes each time."""
    out = folder / f"planted-{source.digest()[:12]}-{seed}"
    host = host_of(source.path)
    if not (out / "config.json").exists():
        clock.say("plant")
        plan = parse("name: planted\nrewrites:\n  - {part: plant-outliers, seed: " + str(seed) + "}\n")
        apply(plan, source.path, out, seed=seed)
    return host.open(out)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = take_lock(folder / LOCK)
    try:
        yield
    finally:
        lock.release()
