"""The commands, in the order in which help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from regauge.cli import choosing, comparing, looking, making, running
from regauge.cli.families import family
from regauge.cli.learning import learn
from regauge.version import __version__

app = typer.Typer(
    name="regauge",
    help="Takes a trained transformer and returns the cheapest network that still does the job, measured on this "
    "machine.",
    add_completion=True,
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


for command in (
    making.fit,
    making.pick,
    making.apply,
    looking.inspect,
    looking.methods,
    looking.explain,
    looking.measure,
    looking.trace,
    comparing.compare,
    choosing.subnets,
    choosing.extract,
    looking.report,
    running.chat,
    running.sample,
    running.serve,
    looking.doctor,
):
    app.command()(command)

app.add_typer(learn)
app.add_typer(family)
