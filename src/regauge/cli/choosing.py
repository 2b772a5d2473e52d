"""Commands about families: their members, measured, and one of them written by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regauge.cli.options import DEBUG, EVAL, FORCE, JSON, OUT, QUIET, SEED, THREADS, VERBOSE, tell_parents

if TYPE_CHECKING:
    from regauge.engine.subnets import Subnets

ARTIFACT = Annotated[str, typer.Argument(metavar="OUT", help="A family: what a recipe with 'family' made.")]


def subnets(
    artifact: ARTIFACT,
    subnet: Annotated[
        list[str] | None,
        typer.Option(metavar="depth=6,ffn=0.5", help="A member to measure, may be repeated; else those worth a look."),
    ] = None,
    evaluation: EVAL = None,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write them as a page too, plotted.")
    ] = None,
    seed: SEED = 0,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """Members of a family side by side, with size, speed and quality. Example: regauge subnets OUT --eval held-out/"""
    from regauge.cli import show
    from regauge.cli.bars import working
    from regauge.engine.subnets import subnets as measure
    from regauge.report.members import write

    with working("measure", quiet, verbose, threads) as watch:
        found = measure(artifact, subnet or (), eval=evaluation, seed=seed, progress=watch)
    written = None if page is None else write(found, page.expanduser())
    if json:
        show.as_json(found)
        return
    _tell(found)
    if written is not None:
        show.line(f"the page: {show.where(written)}")


def extract(
    artifact: ARTIFACT,
    out: OUT,
    subnet: Annotated[str, typer.Option(metavar="depth=6,ffn=0.5", help="Which member, or its name.")],
    calibration: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="An .npz on which its batch norms are given statistics of its own."),
    ] = None,
    force: FORCE = False,
    json: JSON = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """A member of a family as a model of its own. Example: regauge extract OUT --subnet depth=6 -o SMALL"""
    from regauge.cli import show
    from regauge.cli.bars import working
    from regauge.engine.extracting import extract as write

    tell_parents(out)
    with working("apply", True, False, threads):
        done = write(artifact, subnet, out, calibration=calibration, force=force)
    show.as_json(done) if json else show.line(str(done))


def _tell(found: Subnets) -> None:
    """A row a member, the whole first."""
    from regauge.cli import show
    from regauge.report import drafting, members

    show.line(f"{found.path} offers {members.offers(found)}")
    table = members.table(found)
    show.table(list(table.header), [list(row) for row in table.rows])
    show.line(f"quality on {found.text}" if found.text else members.NO_TEXT[found.kind])
    for note in found.notes:
        show.line(f"note: {note}")
    if found.drafting is not None:
        for way in found.drafting.ways[:1]:
            show.line(f"prompt look-up as a draft: {drafting.told(way)}")
        show.line(f"best decoded with {drafting.chosen(found.drafting)}")
