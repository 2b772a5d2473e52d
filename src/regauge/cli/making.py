"""Commands that make an artifact. Each imports what it calls when it is called, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regauge.cli.options import (
    BUDGETS,
    CACHE,
    CALIBRATION,
    DEBUG,
    DEVICE,
    DRAFTS,
    DRY_RUN,
    EVAL,
    FAMILY,
    FLOOR,
    FOR,
    FORCE,
    JSON,
    LENGTH,
    MAX_MEMORY,
    MEMBERS,
    METHODS,
    MODEL,
    OUT,
    QUIET,
    RECOVER,
    REVISION,
    SEED,
    THREADS,
    TIME,
    TOKENS,
    VERBOSE,
    memory,
    seconds,
    spent,
    tell_parents,
)


def fit(
    model: MODEL,
    out: OUT,
    budget: BUDGETS = None,
    floor: FLOOR = None,
    calibration: CALIBRATION = None,
    evaluation: EVAL = None,
    cache: CACHE = None,
    family: FAMILY = None,
    time: TIME = None,
    for_: FOR = None,
    methods: METHODS = None,
    members: MEMBERS = False,
    recover: RECOVER = None,
    drafts: DRAFTS = None,
    tokens: TOKENS = None,
    length: LENGTH = None,
    max_memory: MAX_MEMORY = None,
    seed: SEED = 0,
    revision: REVISION = None,
    force: FORCE = False,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    device: DEVICE = "cpu",
    debug: DEBUG = False,
) -> None:
    """The main job: search, build, measure, report."""
    limit, bound, further = seconds(time), memory(max_memory), seconds(recover, "--recover")
    from regauge.runtime.device import computed_on

    computed_on(device, "fit")
    from regauge.artifact.folder import read_receipt
    from regauge.cli import chosen, show, tell
    from regauge.cli.bars import working
    from regauge.hosts import host_of
    from regauge.report.build import write
    from regauge.search.fit import fit as search
    from regauge.search.members.fit import fit_members
    from regauge.search.members.wanted import Wanted, refuse

    tell_parents(out)
    if members:
        given = {"floor": floor, "cache": cache, "time": time, "for": for_, "recover": recover}
        refuse(given | {"max-memory": max_memory, "dry-run": dry_run or None})
        wanted = Wanted(
            budget or (), calibration, evaluation, methods or (), tokens, length, seed, revision, force, drafts
        )
        with host_of(model).family(family), working("fit", quiet, verbose, threads) as watch:
            found = fit_members(model, out, wanted, watch)
            write(out)
        show.as_json(found) if json else chosen.members(found, out)
        return
    with host_of(model).family(family), working("fit", quiet, verbose, threads) as watch:
        run = search(
            model,
            out,
            budgets=budget or (),
            floor=floor,
            calibration=calibration,
            eval=evaluation,
            time_limit=limit,
            spent=spent(),
            for_=for_,
            methods=methods,
            tokens=tokens,
            length=length,
            max_memory=bound,
            seed=seed,
            revision=revision,
            force=force,
            dry_run=dry_run,
            cache=cache,
            recover=further,
            drafts=drafts,
            progress=watch,
        )
        if not dry_run:
            write(out)
    show.as_json(run) if json else tell.run(run, out, None if dry_run else read_receipt(out))


def pick(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The OUT of an earlier fit.")],
    out: OUT,
    index: Annotated[
        int | None,
        typer.Argument(metavar="POINT", help="Which point of its frontier, as the table numbers them.", min=0),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="memory=0.25x", help="The best point that keeps this, instead of a number.")
    ] = None,
    force: FORCE = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """Another point of the frontier that a fit found. Example: regauge pick OUT --budget memory=0.25x -o SMALLER"""
    from regauge.cli import show, tell
    from regauge.cli.bars import working
    from regauge.report.build import write
    from regauge.search.fit import pick as build

    tell_parents(out)
    with working("pick", quiet, verbose, threads) as watch:
        done = build(run, index, out, force=force, progress=watch, budget=budget)
        write(out)
    show.as_json(done) if json else tell.receipt(done, out)


def apply(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A preset's name or a recipe file (.yaml).")],
    model: MODEL,
    out: OUT,
    calibration: CALIBRATION = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens; the recipe says how many.", min=1)] = None,
    length: LENGTH = None,
    wire: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Insist on compressed-tensors or regauge as the format.")
    ] = None,
    embed: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="The embedding's format: int8, int6-g64, nf4, full.")
    ] = None,
    head: Annotated[str | None, typer.Option(metavar="FORMAT", help="The head's, where it is not tied.")] = None,
    cache: CACHE = None,
    family: FAMILY = None,
    time: TIME = None,
    max_memory: MAX_MEMORY = None,
    seed: SEED = 0,
    revision: REVISION = None,
    force: FORCE = False,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    device: DEVICE = "cpu",
    debug: DEBUG = False,
) -> None:
    """One preset or recipe, without a search."""
    limit, bound = seconds(time), memory(max_memory)
    from regauge.runtime.device import computed_on

    computed_on(device, "apply")
    from regauge import engine
    from regauge.cli import show, tell
    from regauge.cli.bars import working
    from regauge.hosts import host_of
    from regauge.report.build import write

    if dry_run:
        with host_of(model).family(family):
            plan = engine.dry_run(
                recipe,
                model,
                out,
                calibration=calibration,
                tokens=tokens,
                length=length,
                seed=seed,
                revision=revision,
                force=force,
                wire=wire,
                max_memory=bound,
                embed=embed,
                head=head,
                cache=cache,
            )
        show.as_json(plan) if json else tell.dry_run(plan)
        raise typer.Exit(2 if plan.refusals else 0)
    tell_parents(out)
    with host_of(model).family(family), working("apply", quiet, verbose, threads) as watch:
        done = engine.apply(
            recipe,
            model,
            out,
            calibration=calibration,
            tokens=tokens,
            length=length,
            seed=seed,
            revision=revision,
            force=force,
            time_limit=limit,
            max_memory=bound,
            embed=embed,
            head=head,
            cache=cache,
            wire=wire,
            progress=watch,
        )
        write(out)
    show.as_json(done) if json else tell.receipt(done, out)
