"""The command for family tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regauge.cli.options import DEBUG, JSON, MODEL

family = typer.Typer(
    name="family", help="Family tables of your own: see docs/families.md.", no_args_is_help=True, rich_markup_mode=None
)


@family.callback()
def root() -> None: ...


@family.command()
def check(
    table: Annotated[Path, typer.Argument(metavar="FILE", help="The table.")],
    model: MODEL,
    json: JSON = False,
    debug: DEBUG = False,
) -> None:
    """Runs the laws on a table: is all described, and does no move that it admits change what a model computes?

    Takes the model in float64: best a small one of its architecture. Example: regauge family check mine.yaml tiny/
    """
    from regauge.cli import show
    from regauge.hosts import host_of

    found = host_of(model).check_family(table, model)
    if json:
        show.as_json(found)
    else:
        show.line(f"{model}: {found.family}, {found.sites} sites, {found.norms} norms; every parameter is described")
        for note in found.kept:
            show.line(f"  {note}")
        for law in found.laws:
            where = f" on {law.streams} streams" if law.streams else ""
            told = "holds" if law.holds else f"does not hold{f' (first on {law.first})' if law.first else ''}"
            show.line(f"  {law.name}{where}: {told}, the output changes by {law.error:.0e} of its size")
    if not found.holds:
        raise typer.Exit(1)
