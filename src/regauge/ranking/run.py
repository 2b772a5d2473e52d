"""`compare`: rows of methods on one model and text, each made, scored and let go; what the store has is not done again.

Cost: a row makes its artifact and reads the text twice, with the original and with the artifact; one artifact at a time
lies on disk. Peak memory: that of `apply`, then that of measuring.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from regauge.artifact.disk import one_sentence, take_lock
from regauge.artifact.receipt import Receipt
from regauge.engine.api import apply
from regauge.engine.measuring import text_of
from regauge.engine.watchdog import Clock, Progress, Watcher, nobody, quiet_torch
from regauge.errors import ExactnessError, ModelError, MoveError, RecipeError, RefusedError, RegaugeError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.measure.bootstrap import FEW, Floats
from regauge.measure.compare import batch_tokens
from regauge.measure.quality import Scores, summarise
from regauge.measure.quality import compare as scored
from regauge.plan import Plan, digest, parse
from regauge.ranking.null import null
from regauge.ranking.record import Rank, Ranking, Result, Row, Standing, Windowed, against
from regauge.ranking.settings import ALL, FULL, Entry, Setting, chosen, known, setting_of
from regauge.ranking.store import Store, key_of
from regauge.ranking.worth import deciding, pools, wins, worths
from regauge.text.corpora import Where, corpus
from regauge.text.windows import Windows, begin
from regauge.version import __version__

LOCK = ".lock"
FOLDER = "compare"
OF_THE_ROW = (RecipeError, MoveError, RefusedError, ExactnessError)
"""What is wrong with one row on this model, and is told beside the others; all else ends the run."""


@dataclass(frozen=True)
class Given:
    """What every row reads.

    Attributes:
        tokens: of calibration text; None: as the recipe says.
    """

    calibration: Where | None
    eval: Where | None
    tokens: int | None
    seed: int
    max_memory: int | None


@dataclass(frozen=True, eq=False)
class _Bench:
    """A model and its texts, opened."""

    model: Path | str
    name: str
    digest: str
    calibration: str
    windows: Windows
    halved: Windows
    vocabulary: int
    given: Given


def compare_methods(
    model: str | Path,
    methods: str | Sequence[str] = ALL,
    at: str | Sequence[str] | None = None,
    given: Given = Given(None, None, None, 0, None),
    folder: Path = Path(FOLDER),
    planted: bool = False,
    revision: str | None = None,
    progress: Watcher | None = None,
) -> Standing:
    """Rows of methods side by side; results are kept in `folder` as they come.

    Args:
        planted: on the model's planted form (`rewrites/planting.py`), which is made in `folder`.

    Raises:
        RegaugeError: any refusal that is not about one row alone; or every row was refused.
    """
    clock = Clock(progress or nobody)
    entries = chosen(methods, at)
    with one_sentence("making", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), Store.open(folder) as store, quiet_torch():
        clock.say("open")
        source = host_of(model).open(model, revision)
        if planted:
            source = _planted(source, folder, given.seed, clock)
        bench = _bench(source, str(model) + (" (planted)" if planted else ""), given)
        done, refused, made = _results(entries, bench, store, folder, progress or nobody)
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
        made=made,
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
    entries: Sequence[Entry], bench: _Bench, store: Store, folder: Path, watch: Watcher
) -> tuple[dict[str, Result], dict[str, RegaugeError], int]:
    """Digest of the recipe → result, of methods and nulls; what was refused; how many were made now."""
    wanted: dict[str, tuple[str, Plan, Setting, str]] = {}
    for entry in entries:
        other = null(entry.plan)
        wanted[digest(entry.plan)] = (entry.name, entry.plan, entry.setting, "" if other is None else digest(other))
    for entry in entries:
        other = null(entry.plan)
        if other is not None and setting_of(other) == entry.setting:
            wanted.setdefault(digest(other), (_called(other), other, entry.setting, ""))
    done: dict[str, Result] = {}
    refused: dict[str, RegaugeError] = {}
    made = 0
    for number, (recipe, (name, plan, setting, base)) in enumerate(wanted.items()):
        watch(Progress("compare", number, len(wanted), message=name))
        key = key_of(_identity(bench, recipe))
        found = store.get(key)
        if found is None:
            try:
                found = _made(bench, plan, (name, recipe, str(setting), base), folder / f"making-{key[:12]}", watch)
            except OF_THE_ROW as error:
                refused[name] = error
                continue
            store.put(key, found, time.time())
            made += 1
        done[recipe] = found.model_copy(update={"method": name, "name": bench.name, "null": base})
    watch(Progress("compare", len(wanted), len(wanted)))
    return done, refused, made


def _identity(bench: _Bench, recipe: str) -> dict[str, object]:
    given = bench.given
    return {
        "model": bench.digest,
        "recipe": recipe,
        "calibration": bench.calibration,
        "text": bench.windows.hash(),
        "tokens": given.tokens,
        "seed": given.seed,
        "version": __version__,
    }


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


def _made(bench: _Bench, plan: Plan, said: tuple[str, str, str, str], out: Path, watch: Watcher) -> Result:
    """One recipe applied, scored and let go."""
    given, (name, recipe, setting, base) = bench.given, said
    shutil.rmtree(out, ignore_errors=True)  # whole, and never scored: a run was ended between
    receipt = apply(
        plan,
        bench.model,
        out,
        calibration=given.calibration,
        tokens=given.tokens,
        seed=given.seed,
        max_memory=given.max_memory,
        progress=watch,
    )
    try:
        windows = bench.halved if Setting.read(setting).kept != FULL else bench.windows
        scores, most = _scores(bench, windows, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return Result(
        model=bench.digest,
        name=bench.name,
        text=windows.hash(),
        read=windows.description,
        recipe=recipe,
        method=name,
        setting=setting,
        null=base,
        seed=given.seed,
        quality=summarise(scores, given.seed),
        bytes=receipt.bytes_after,
        bits=round(bits_in_blocks(receipt), 4),
        seconds=receipt.seconds,
        peak=receipt.peak_bytes,
        windows=_by_window(scores, windows, most),
    )


def bits_in_blocks(receipt: Receipt) -> float:
    """Bits a weight of the matrices in blocks, everything stored for them counted."""
    sites = [site for site in receipt.sites if site.name.startswith("blocks.")]
    return 8 * sum(site.bytes_after for site in sites) / max(1, sum(s.shape[0] * s.shape[1] for s in sites))


def _scores(bench: _Bench, windows: Windows, out: Path) -> tuple[Scores, int]:
    host, most = host_of(bench.model), 1 if windows.halved else batch_tokens(bench.vocabulary)
    inputs = [{"input_ids": batch.ids_BT} for batch in windows.batches(most)]
    with torch.inference_mode():
        original, other = host.outputs(bench.model, inputs)(), host.outputs(out, inputs)()
        return scored(windows, original, other, most), most


def _by_window(scores: Scores, windows: Windows, most: int) -> Windowed:
    """Sums over each window, in the order in which tokens were scored."""
    lengths = [length for batch in windows.batches(most) for length in batch.lengths]
    tokens_W = np.array([length - 1 - begin(length, windows.halved) for length in lengths], dtype=np.int64)
    starts_W = np.concatenate([[0], np.cumsum(tokens_W)[:-1]])
    few = windows.documents < FEW
    unit_W = np.arange(len(lengths)) if few else np.array(windows.document)
    return Windowed(np.add.reduceat(scores.kl_N, starts_W), tokens_W, unit_W.astype(np.int64))


def _bench(source: Source, name: str, given: Given) -> _Bench:
    host = host_of(source.path)
    facts = host.facts(source.path)
    if not facts.generative:
        raise ModelError(f"compare ranks methods by the KL of next tokens, and {name} gives {facts.gives}.")
    windows = text_of(source.path, given.eval, facts, given.seed)
    return _Bench(
        model=source.path,
        name=name,
        digest=source.digest(),
        calibration="" if given.calibration is None else corpus(given.calibration).sha256,
        windows=windows,
        halved=replace(windows, halved=True),
        vocabulary=facts.vocabulary,
        given=given,
    )


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
