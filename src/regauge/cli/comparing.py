"""`regauge compare`. It imports what it calls when called: `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regauge.cli.options import (
    CALIBRATION,
    DEBUG,
    EVAL,
    FAMILY,
    JSON,
    MAX_MEMORY,
    MODEL,
    QUIET,
    REVISION,
    SEED,
    THREADS,
    TOKENS,
    VERBOSE,
    memory,
)

if TYPE_CHECKING:
    from regauge.ranking.record import Standing


def compare(
    model: MODEL,
    methods: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Presets, preset files (gptq), published rows, recipe files; or all."),
    ] = "all",
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="w4a16,w8a8", help="Only at these bits of weights and inputs (w4a4kv4: cache)."),
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where results are kept; a rerun goes on from them.")
    ] = Path("compare"),
    calibration: CALIBRATION = None,
    evaluation: EVAL = None,
    tokens: TOKENS = None,
    planted: Annotated[
        bool, typer.Option("--planted", help="On the model moved into a gauge with a large model's outliers.")
    ] = False,
    max_memory: MAX_MEMORY = None,
    family: FAMILY = None,
    seed: SEED = 0,
    revision: REVISION = None,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """Methods side by side, ranked, each beside its null. Example: regauge compare MODEL --methods gptq,rtn"""
    bound = memory(max_memory)
    from regauge.cli import show
    from regauge.cli.bars import working
    from regauge.hosts import host_of
    from regauge.ranking.bench import Given
    from regauge.ranking.run import compare_methods
    from regauge.report.ranking import write

    given = Given(calibration, evaluation, tokens, seed, bound, planted, revision)
    with host_of(model).family(family), working("compare", quiet, verbose, threads) as watch:
        found = compare_methods(model, methods, at, given, out.expanduser(), watch)
        page = write(found)
    if json:
        show.as_json(found)
        return
    _tell(found, page)


def _tell(found: Standing, page: Path) -> None:
    """A table a setting, the nearest first; what was refused; the ranking over every model in the folder."""
    from regauge.cli import show
    from regauge.report import ranking

    show.line(f"{found.model}: {found.tokens:,} tokens of {found.read}; KL in nats a token, with 95 % intervals")
    for one in ranking.tables(found):
        show.table(list(one.header), [list(row) for row in one.rows], one.title)
    for name, why in found.refused.items():
        show.line(f"  refused: {name}: {why}")
    for text in (*ranking.told(found), *found.notes):
        show.line(f"  {text}")
    known = len(found.rows) - found.made
    show.line(f"{found.made} made now, {known} from {show.where(found.folder)}; the page: {show.where(page)}")
