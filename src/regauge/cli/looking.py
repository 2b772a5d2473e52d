"""Commands that look at models, methods and runs. They import what they call when called: `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regauge.cli.options import (
    CACHE,
    CALIBRATION,
    DEBUG,
    DEVICE,
    EVAL,
    FAMILY,
    JSON,
    MAX_MEMORY,
    MODEL,
    QUIET,
    REVISION,
    SEED,
    THREADS,
    VERBOSE,
    memory,
    told_memory,
)


def inspect(
    model: MODEL,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also predict what rounding each matrix to 4 bits would cost.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="8GB", help="Only what fits in this, with its cache.")
    ] = None,
    context: Annotated[str, typer.Option("--context", metavar="32k", help="Tokens that the cache holds.")] = "32k",
    streams: Annotated[
        bool, typer.Option("--streams", help="Also list streams, the moves that each admits, and where others stop.")
    ] = False,
    positions: Annotated[
        bool, typer.Option("--positions", help="Also how far bf16 products drift from relative in long texts.")
    ] = False,
    calibration: CALIBRATION = None,
    family: FAMILY = None,
    seed: SEED = 0,
    revision: REVISION = None,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """What a model is made of, and what it would take. Example: regauge inspect MODEL --memory 8GB"""
    from regauge.cli import models, show
    from regauge.cli.bars import working
    from regauge.hosts import host_of
    from regauge.report import inspection

    fits = told_memory(memory, context)
    with host_of(model).family(family):
        found = inspection.inspect(model, revision)
        sensed, drifts = None, None
        if positions:
            from regauge.report.positions import positions as measured

            drifts = measured(model, revision, seed)
        if sensitivity:
            from regauge.search.sense import sensitivity as sense

            with working("inspect", quiet, verbose, threads) as watch:
                sensed = sense(model, calibration=calibration, seed=seed, revision=revision, progress=watch)
    if json:
        show.as_json(show.plain(found) | {"sensitivity": show.plain(sensed), "positions": show.plain(drifts)})
        return
    models.inspection(found, streams)  # after every refusal
    models.sizes(found, fits)
    if drifts is not None:
        models.positions(drifts)
    if sensed is not None:
        models.sensitivity(sensed)


def doctor(json: JSON = False, debug: DEBUG = False) -> None:
    """Whether this machine is fit for the work: kernels, threads, memory, what is installed, how busy it is."""
    from regauge.cli import rows, show
    from regauge.report.doctor import doctor as look

    found = look()
    show.as_json(found) if json else rows.doctor(found)


def methods(
    word: Annotated[str | None, typer.Argument(metavar="[WORD]", help="In its name, title, place or paper.")] = None,
    bits: Annotated[int | None, typer.Option(min=1, max=16, help="Only presets of so many bits a weight.")] = None,
    loads_in: Annotated[
        str | None, typer.Option(metavar="RUNTIME", help="Only presets that transformers, vllm or sglang reads.")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Only what a paper describes.")] = False,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Every preset and part: paper, place, cost, and what it was measured to gain. Example: regauge methods --bits 4"""
    from regauge.cli import rows, show
    from regauge.report.methods import methods as known

    found = known(word, bits, loads_in, paper)
    show.as_json(found) if json else rows.methods(found)


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


def measure(
    models: Annotated[list[str], typer.Argument(metavar="A [B ...]", help="The first is what the others are held to.")],
    evaluation: EVAL = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Also answer questions: tasks of lm-eval by name (regauge[tasks]), or a .jsonl of prompt, choices and "
            "answer; several with commas.",
        ),
    ] = None,
    long: Annotated[
        int,
        typer.Option(
            "--long",
            metavar="N",
            min=0,
            help="Also have the first model write so many tokens, and tell how long the others would write the same.",
        ),
    ] = 0,
    arithmetic: Annotated[
        str | None,
        typer.Option(
            "--arithmetic",
            metavar="l-mul:4",
            help="How products of all models but the first are taken: quality under it, no speed. A model alone is "
            "held against itself.",
        ),
    ] = None,
    max_memory: MAX_MEMORY = None,
    cache: CACHE = None,
    seed: SEED = 0,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    device: DEVICE = "cpu",
    debug: DEBUG = False,
) -> None:
    """Quality, memory and speed, side by side. Example: regauge measure MODEL OUT --tasks mine.jsonl"""
    bound = memory(max_memory)
    from regauge import engine
    from regauge.cli import show, tell
    from regauge.cli.bars import working
    from regauge.runtime.device import computed_on

    computed_on(device, "measure")
    with working("measure", quiet, verbose, threads) as watch:
        found = engine.measure(
            models,
            eval=evaluation,
            seed=seed,
            progress=watch,
            max_memory=bound,
            tasks=tasks,
            cache=cache,
            long=long,
            arithmetic=arithmetic,
        )
    show.as_json(found) if json else tell.measurement(found)


def trace(
    model: MODEL,
    integers: Annotated[
        bool, typer.Option("--integers", help="Fail, naming them, unless all are products of integers.")
    ] = False,
    family: FAMILY = None,
    seed: SEED = 0,
    json: JSON = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """Every product of matrices of a model as it runs: of integers or floats, native or simulated. Example: regauge
    trace OUT --integers
    """
    from regauge.cli import rows, show
    from regauge.cli.bars import working
    from regauge.engine.tracing import trace as traced

    with working("trace", True, False, threads):
        found = traced(model, integers=integers, family=family, seed=seed)
    show.as_json(found) if json else rows.trace(found)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The OUT of a fit or an apply.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Default: RUN/regauge/report.html.")
    ] = None,
    debug: DEBUG = False,
) -> None:
    """One self-contained page of a run."""
    from regauge.cli import show
    from regauge.report.build import write

    show.line(str(write(run, out)))
