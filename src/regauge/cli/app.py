"""The commands. Each imports what it calls when it is called, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regauge.cli.options import (
    BUDGETS,
    CALIBRATION,
    DEBUG,
    DRY_RUN,
    EVAL,
    FLOOR,
    FORCE,
    JSON,
    MAX_MEMORY,
    MODEL,
    OUT,
    REVISION,
    SEED,
    TIME,
    memory,
    seconds,
)
from regauge.version import __version__

app = typer.Typer(
    name="regauge",
    help="Takes a trained transformer and returns the cheapest network that still does the job, measured on this "
    "machine.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"regauge {__version__}")
        raise typer.Exit
    return value


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...


@app.command()
def fit(
    model: MODEL,
    out: OUT,
    budget: BUDGETS = None,
    floor: FLOOR = None,
    calibration: CALIBRATION = None,
    evaluation: EVAL = None,
    time: TIME = None,
    seed: SEED = 0,
    revision: REVISION = None,
    force: FORCE = False,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """The main job: search, build, measure, report."""
    limit = seconds(time)
    from regauge import report as pages
    from regauge.cli import show, tell
    from regauge.search.fit import fit as search

    with show.progress(quiet=json) as watch:
        run = search(
            model,
            out,
            budgets=budget or (),
            floor=floor,
            calibration=calibration,
            eval=evaluation,
            time_limit=limit,
            seed=seed,
            revision=revision,
            force=force,
            dry_run=dry_run,
            progress=watch,
        )
        if not dry_run:
            pages.write(out)
    show.as_json(run) if json else tell.run(run, out)


@app.command()
def pick(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The OUT of an earlier fit.")],
    index: Annotated[int, typer.Argument(metavar="POINT", help="Which point of its frontier.", min=0)],
    out: OUT,
    force: FORCE = False,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Another point of the frontier that a fit found."""
    from regauge.cli import show, tell
    from regauge.search.fit import pick as build

    with show.progress(quiet=json) as watch:
        done = build(run, index, out, force=force, progress=watch)
    show.as_json(done) if json else tell.receipt(done, out)


@app.command()
def apply(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A preset's name or a recipe file (.yaml).")],
    model: MODEL,
    out: OUT,
    calibration: CALIBRATION = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens; the recipe says how many.", min=1)] = None,
    wire: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Insist on compressed-tensors or regauge as the format.")
    ] = None,
    time: TIME = None,
    max_memory: MAX_MEMORY = None,
    seed: SEED = 0,
    revision: REVISION = None,
    force: FORCE = False,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """One preset or recipe, without a search."""
    limit, bound = seconds(time), memory(max_memory)
    from regauge import engine
    from regauge.cli import show, tell

    if dry_run:
        plan = engine.dry_run(
            recipe,
            model,
            out,
            calibration=calibration,
            tokens=tokens,
            seed=seed,
            revision=revision,
            force=force,
            wire=wire,
            max_memory=bound,
        )
        show.as_json(plan) if json else tell.dry_run(plan)
        raise typer.Exit(2 if plan.refusals else 0)
    with show.progress(quiet=json) as watch:
        done = engine.apply(
            recipe,
            model,
            out,
            calibration=calibration,
            tokens=tokens,
            seed=seed,
            revision=revision,
            force=force,
            time_limit=limit,
            max_memory=bound,
            wire=wire,
            progress=watch,
        )
    show.as_json(done) if json else tell.receipt(done, out)


@app.command()
def inspect(
    model: MODEL,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also predict what rounding each matrix to 4 bits would cost.")
    ] = False,
    calibration: CALIBRATION = None,
    seed: SEED = 0,
    revision: REVISION = None,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Sites, bytes, streams and their moves."""
    from regauge.cli import show, tell
    from regauge.report import inspection

    found = inspection.inspect(model, revision)
    sensed = None
    if sensitivity:
        from regauge.search.sense import sensitivity as sense

        with show.progress(quiet=json) as watch:
            sensed = sense(model, calibration=calibration, seed=seed, revision=revision, progress=watch)
    if json:
        show.as_json(show.plain(found) | {"sensitivity": show.plain(sensed)})
        return
    tell.inspection(found)  # after every refusal
    if sensed is not None:
        tell.sensitivity(sensed)


@app.command()
def methods(
    word: Annotated[str | None, typer.Argument(metavar="[WORD]", help="In its name, title, place or paper.")] = None,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Every preset and part: paper, place, cost, and what it was measured to gain."""
    from regauge.cli import rows, show
    from regauge.report.methods import methods as known

    found = known(word)
    show.as_json(found) if json else rows.methods(found)


@app.command()
def explain(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A preset, a recipe file or a part.")] = None,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """What a preset or part does and costs."""
    from regauge.cli import show
    from regauge.report import explanation

    if json:
        show.as_json(explanation.listing() if name is None else explanation.facts(name))
    else:
        show.line(explanation.explain(name))


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(metavar="A [B ...]", help="The first is what the others are held to.")],
    evaluation: EVAL = None,
    seed: SEED = 0,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Quality, memory and speed, side by side."""
    from regauge import engine
    from regauge.cli import show, tell

    with show.progress(quiet=json) as watch:
        found = engine.measure(models, eval=evaluation, seed=seed, progress=watch)
    show.as_json(found) if json else tell.measurement(found)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The OUT of a fit or an apply.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: RUN/regauge/report.html.")
    ] = None,
    debug: DEBUG = False,
) -> None:
    """One self-contained page of a run."""
    from regauge import report as pages
    from regauge.cli import show

    show.line(str(pages.write(run, out)))
