"""Commands that train. Each imports what it calls when it is called, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from regauge.cli.options import (
    DEBUG,
    DRY_RUN,
    FAMILY,
    FORCE,
    JSON,
    LENGTH,
    MODEL,
    OUT,
    QUIET,
    REVISION,
    SEED,
    THREADS,
    TIME,
    TRAINED,
    VERBOSE,
    seconds,
    tell_parents,
)

TRAIN = "train"
MOST = Annotated[int | None, typer.Option("--tokens", min=1, help="The most tokens of text to train on.")]


SHARD = Annotated[
    bool, typer.Option("--shard", help="Processes of torchrun hold the family together, each a part of every tensor.")
]


class Recipes(TyperGroup):
    """`learn RECIPE MODEL` is `learn train RECIPE MODEL`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [TRAIN, *args]
        return super().resolve_command(ctx, args)


learn = typer.Typer(
    name="learn",
    cls=Recipes,
    help="Trains: `learn RECIPE MODEL -o OUT` a family, `learn recover OUT` an artifact. See docs/learn.md.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@learn.callback()
def root() -> None: ...


@learn.command()
def recover(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="An artifact of fit or apply; it is replaced.")],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text to train on; a tenth of it is held out. Without it the original samples its own.",
        ),
    ] = None,
    original: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What it was made of; without it as its receipt says.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT2", help="Where it goes, in place of OUT itself.")
    ] = None,
    time: TIME = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; without it 256, or what fits --time.")
    ] = None,
    tokens: MOST = None,
    length: LENGTH = None,
    rank: Annotated[
        int, typer.Option(min=0, help="Add low-rank terms of this rank to every matrix of the blocks.")
    ] = 0,
    family: FAMILY = None,
    seed: SEED = 0,
    force: FORCE = False,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """What an artifact left in full precision, trained towards its original. Example: regauge learn recover OUT --time
    20m --text novels/
    """
    limit = seconds(time)
    from regauge.cli import show, tell, tell_training
    from regauge.cli.bars import working
    from regauge.engine.recovery import Asked
    from regauge.engine.recovery import recover as train
    from regauge.engine.recovery_cost import planned
    from regauge.engine.recovery_text import Amounts
    from regauge.hosts import host_of
    from regauge.report.build import write

    asked = Asked(Amounts(tokens, length, steps, limit), rank, seed, out, force)
    with host_of(original or str(artifact)).family(family):
        if dry_run:
            plan = planned(artifact, text, original, asked)
            show.as_json(plan) if json else tell_training.recovery_plan(plan)
            return
        tell_parents(out or artifact)
        with working("recover", quiet, verbose, threads) as watch:
            done = train(artifact, text, original, asked, watch)
            write(out or artifact)
    show.as_json(done) if json else tell.recovered(done, out or artifact)


@learn.command(name=TRAIN)
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A preset that trains a family, or a recipe with family and train.")
    ],
    model: MODEL,
    out: OUT,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Text to train on; a tenth of it is held out. Without it the model samples its own."
        ),
    ] = None,
    time: TIME = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; without it as the recipe says, or what fits --time.")
    ] = None,
    tokens: MOST = None,
    length: LENGTH = None,
    family: FAMILY = None,
    revision: REVISION = None,
    seed: SEED = 0,
    device: TRAINED = "cpu",
    shard: SHARD = False,
    force: FORCE = False,
    dry_run: DRY_RUN = False,
    json: JSON = False,
    quiet: QUIET = False,
    verbose: VERBOSE = False,
    threads: THREADS = None,
    debug: DEBUG = False,
) -> None:
    """A family made as a recipe says, its members trained together. `torchrun -m regauge learn` shares the work between
    processes. Example: regauge learn once-for-all MODEL -o OUT --time 20m --text novels/
    """
    limit = seconds(time)
    from regauge.cli import show, tell_training
    from regauge.cli.bars import working
    from regauge.engine.recovery_text import Amounts
    from regauge.engine.training import train as raised
    from regauge.engine.training_cost import planned
    from regauge.engine.training_recipe import Asked
    from regauge.hosts import host_of
    from regauge.learn.ranks import writes
    from regauge.report.build import write

    asked = Asked(Amounts(tokens, length, steps, limit), seed, revision, force, device=device, shard=shard)
    with host_of(model).family(family):
        if dry_run:
            plan = planned(recipe, model, text, asked)
            show.as_json(plan) if json else tell_training.training_plan(plan)
            return
        tell_parents(out)
        with working("learn", quiet or not writes(), verbose, threads) as watch:
            done = raised(recipe, model, out, text, asked, watch)
        if not writes():
            return
        write(out)
    show.as_json(done) if json else tell_training.trained(done, out)
