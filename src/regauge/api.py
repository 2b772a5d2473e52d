"""What Python offers of the commands: the same names and options, amounts as the command line takes them.

    import regauge as rg

    run = rg.fit("MODEL", "OUT", budget="memory=0.30x", time="5m")
    receipt = rg.apply("gptq-w4g128", "MODEL", "OUT", max_memory="6GB")
    print(rg.measure("MODEL", "OUT", eval="held-out/"))
    rg.report("OUT")

Progress is shown as the command shows it; `progress=` takes a function of your own instead, `quiet=True` shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regauge import amounts
from regauge.artifact.receipt import Receipt
from regauge.cli.training import Watcher, seconds, watching
from regauge.engine import apply as _apply
from regauge.engine import dry_run as _dry_run
from regauge.engine import measure as _measure
from regauge.engine.estimate import DryRun
from regauge.hosts import host_of
from regauge.measure.compare import Comparison
from regauge.plan import Plan
from regauge.plan.caches import Asked
from regauge.ranking.bench import Given
from regauge.ranking.record import Standing
from regauge.report.build import write
from regauge.report.ranking import write as write_ranking
from regauge.runtime.device import computed_on
from regauge.search.fit import fit as _fit
from regauge.search.fit import pick as _pick
from regauge.search.members.fit import fit_members
from regauge.search.members.record import Chosen
from regauge.search.members.wanted import Wanted, refuse
from regauge.search.record import Run
from regauge.text.corpora import Where


def fit(
    model: str | Path,
    out: str | Path,
    budget: str | Sequence[str] = (),
    *,
    floor: str | None = None,
    calibration: Where | None = None,
    eval: Where | None = None,
    cache: str | None = None,
    time: str | float | None = None,
    for_: str | None = None,
    methods: str | Sequence[str] | None = None,
    members: bool = False,
    recover: str | float | None = None,
    drafts: str | None = None,
    tokens: int | None = None,
    length: int | None = None,
    max_memory: str | int | None = None,
    seed: int = 0,
    revision: str | None = None,
    family: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    device: str = "cpu",
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Run | Chosen:
    """The main job: search, build, measure; the page is written beside the artifact.

    Args:
        budget: one or several of `memory=0.30x`, `memory=2GB`, `memory@32k=4GB`, `decode=1.5x`; none: the knee.
        floor: `kl=0.05`: lose no more than this.
        calibration, eval: text that methods read, and text that the final figures are measured on.
        cache: a preset or recipe file of what the artifact keeps of the past (`kivi-4`).
        time: `5m` or seconds: it ends in this time, or refuses before any work.
        for_: `vllm`, `transformers` or `sglang` (`--for`): only what that loads is chosen from.
        methods: presets: only what these make of a matrix is chosen from; `"gptq-w4g128,rtn-w8"` or a list.
        members: one artifact with a member for each budget: see docs/once-for-all.md.
        recover: `20m` or seconds, beyond `time`: what stays in full precision is trained towards the original.
        drafts: `any`, `none`, `lookup` or a member: what may draft; `any` where a budget is of decode.
        tokens, length: how much calibration text is read, in windows of which length.
        max_memory: `6GB` or bytes that this process may take.
        family: a file of your own that describes the architecture; see docs/families.md.

    Raises:
        RegaugeError: any refusal, in a sentence.
    """
    computed_on(device, "fit")
    budgets = [budget] if isinstance(budget, str) else budget
    if members:
        given = {"floor": floor, "cache": cache, "time": time, "for": for_, "recover": recover}
        refuse(given | {"max-memory": max_memory, "dry-run": dry_run or None})
        wanted = Wanted(budgets, calibration, eval, methods or (), tokens, length, seed, revision, force, drafts)
        with host_of(model).family(family), watching("fit", progress, quiet) as watch:
            chosen = fit_members(model, out, wanted, watch)
            write(out)
        return chosen
    with host_of(model).family(family), watching("fit", progress, quiet) as watch:
        run = _fit(
            model,
            out,
            budgets,
            floor,
            calibration,
            eval,
            time_limit=seconds(time),
            for_=for_,
            methods=methods,
            tokens=tokens,
            length=length,
            max_memory=_bytes(max_memory),
            seed=seed,
            revision=revision,
            force=force,
            dry_run=dry_run,
            cache=cache,
            recover=seconds(recover),
            drafts=drafts,
            progress=watch,
        )
        if not dry_run:
            write(out)
    return run


def pick(
    run: str | Path,
    point: int | None,
    out: str | Path,
    *,
    budget: str | None = None,
    force: bool = False,
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Receipt:
    """Another point of the frontier that `fit` found, without searching again; `point` None: the best in `budget`.
    Its page is written beside it."""
    with watching("pick", progress, quiet) as watch:
        done = _pick(run, point, out, force=force, progress=watch, budget=budget)
        write(out)
    return done


def apply(
    recipe: str | Path | Plan,
    model: str | Path,
    out: str | Path,
    *,
    calibration: Where | None = None,
    tokens: int | None = None,
    length: int | None = None,
    wire: str | None = None,
    embed: str | None = None,
    head: str | None = None,
    cache: Asked | None = None,
    time: str | float | None = None,
    max_memory: str | int | None = None,
    seed: int = 0,
    revision: str | None = None,
    family: str | Path | None = None,
    force: bool = False,
    device: str = "cpu",
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Receipt:
    """One preset or recipe, without a search; the page is written beside the artifact. Options as of `regauge apply`;
    see `engine.apply` for each.

    Raises:
        RegaugeError: any refusal, all of them at once and before any work; what was finished stays for the next run.
    """
    computed_on(device, "apply")
    with host_of(model).family(family), watching("apply", progress, quiet) as watch:
        done = _apply(
            recipe,
            model,
            out,
            calibration=calibration,
            tokens=tokens,
            length=length,
            wire=wire,
            embed=embed,
            head=head,
            cache=cache,
            time_limit=seconds(time),
            max_memory=_bytes(max_memory),
            seed=seed,
            revision=revision,
            force=force,
            progress=watch,
        )
        write(out)
    return done


def dry_run(recipe: str | Path | Plan, model: str | Path, out: str | Path | None = None, **options: Any) -> DryRun:
    """What `apply` would do with the same arguments: each site, bytes, passes, time and disk, and every refusal."""
    computed_on(options.pop("device", "cpu"), "apply")
    if "max_memory" in options:
        options["max_memory"] = _bytes(options["max_memory"])
    return _dry_run(recipe, model, out, **options)


def measure(
    *models: str | Path,
    eval: Where | None = None,
    tasks: str | Path | Sequence[str] | None = None,
    max_memory: str | int | None = None,
    cache: Asked | None = None,
    long: int = 0,
    arithmetic: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Comparison:
    """Quality, memory and speed, side by side; the first model is what the others are held to.

    Args:
        tasks: names of lm-eval's tasks, or files of questions: `"arc_easy,mine.jsonl"` or a list.
        cache: what all but the first keep of the past, as `load` takes it; a model alone is held against itself.
        long: tokens that the first model writes greedily behind some prompts: until where the others would have written
            the same, and how KL grows along them.
        arithmetic: how products of all but the first are taken, `"l-mul:4"`; a model alone is held against itself.
    """
    computed_on(device, "measure")
    with watching("measure", progress, quiet) as watch:
        return _measure(
            models,
            eval=eval,
            seed=seed,
            progress=watch,
            max_memory=_bytes(max_memory),
            tasks=tasks,
            cache=cache,
            long=long,
            arithmetic=arithmetic,
        )


def compare(
    model: str | Path,
    methods: str | Sequence[str] = "all",
    at: str | Sequence[str] | None = None,
    out: str | Path = "compare",
    *,
    calibration: Where | None = None,
    eval: Where | None = None,
    tokens: int | None = None,
    planted: bool = False,
    max_memory: str | int | None = None,
    seed: int = 0,
    revision: str | None = None,
    family: str | Path | None = None,
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Standing:
    """Methods side by side on one model and text, each beside its null; results are kept in `out`, and a second run
    makes only what is missing. The page is `out/ranking.html`.

    Args:
        methods: `all`, or presets, preset files (`gptq`), published rows (`smoothquant`), recipe files.
        at: settings, `"w4a16,w8a8"` or a list; None: all that the methods are at.
        planted: on the model moved into a gauge with the outliers of a large one, its function untouched.

    Raises:
        RegaugeError: any refusal; a method that this model does not admit is told in `refused` instead.
    """
    from regauge.ranking.run import compare_methods  # late: SQLAlchemy, which no other call needs

    given = Given(calibration, eval, tokens, seed, _bytes(max_memory), planted, revision)
    with host_of(model).family(family), watching("compare", progress, quiet) as watch:
        found = compare_methods(model, methods, at, given, Path(out).expanduser(), watch)
        write_ranking(found)
    return found


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """One self-contained page of a run; where it was written."""
    return write(run, out)


def _bytes(memory: str | int | None) -> int | None:
    return amounts.memory(memory, f"max_memory={memory!r}") if isinstance(memory, str) else memory
