"""What Python offers of the commands that train, beside `api.py`.

import regauge as rg

print(rg.recover("OUT", text="novels/", time="20m").recovered)
print(rg.train("once-for-all", "MODEL", "OUT", text="novels/", time="20m").trained)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from regauge import amounts
from regauge.artifact.receipt import Receipt
from regauge.cli.bars import Event
from regauge.cli.bars import progress as bars
from regauge.elastic.subnet import Subnet
from regauge.engine.recovery import Asked
from regauge.engine.recovery import recover as _recover
from regauge.engine.recovery_cost import Planned, planned
from regauge.engine.recovery_text import Amounts
from regauge.engine.subnets import Subnets
from regauge.engine.subnets import subnets as _subnets
from regauge.engine.training import train as _train
from regauge.engine.training_cost import Planned as PlannedTraining
from regauge.engine.training_cost import planned as planned_training
from regauge.engine.training_recipe import Asked as AskedTraining
from regauge.hosts import host_of
from regauge.learn.ranks import writes
from regauge.plan import Plan
from regauge.report.build import write
from regauge.report.members import write as write_page
from regauge.text.corpora import Where

Watcher = Callable[[Event], None]


def recover(
    artifact: str | Path,
    text: Where | None = None,
    *,
    original: str | Path | None = None,
    out: str | Path | None = None,
    time: str | float | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    length: int | None = None,
    rank: int = 0,
    seed: int = 0,
    family: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Receipt | Planned:
    """What an artifact left in full precision, trained towards its original's logits: `regauge learn recover`.

    Args:
        artifact: a directory of `fit` or `apply`; it is replaced once the new one is whole, unless `out` says another.
        text: to train on; a tenth of it is held out and decides what is kept. None: the original samples its own.
        original: what the artifact was made of; None: as its receipt says.
        time: `20m` or seconds: the pace is measured and as many steps are taken as there is time for.
        rank: of low-rank terms to add to every matrix of the blocks; 0 for none.

    Raises:
        RegaugeError: any refusal, before any work; what was learnt stays for the next run.
    """
    where = None if out is None else Path(out)
    asked = Asked(Amounts(tokens, length, steps, seconds(time)), rank, seed, where, force)
    with host_of(str(original or artifact)).family(family):
        if dry_run:
            return planned(artifact, text, original, asked)
        with watching("recover", progress, quiet) as watch:
            done = _recover(artifact, text, original, asked, watch)
            write(where or artifact)
    return done


def train(
    recipe: str | Path | Plan,
    model: str | Path,
    out: str | Path,
    text: Where | None = None,
    *,
    time: str | float | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    shard: bool = False,
    revision: str | None = None,
    family: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Receipt | PlannedTraining:
    """A family made as a recipe says, its members trained together: `regauge learn RECIPE MODEL -o OUT`.

    Args:
        recipe: a preset that trains a family (`once-for-all`), or a recipe with `family` and `train`.
        out: the directory to make.
        text: to train on; a tenth of it is held out and decides what is kept. None: the model samples its own.
        time: `20m` or seconds: the pace is measured and as many steps are taken as there is time for.
        device: where members run forward and backward: `cpu`, `cuda`, `cuda:1`.
        shard: several processes, started by torchrun, hold the family together, each a part of every tensor.

    Raises:
        RegaugeError: any refusal, before any work; what was learnt stays for the next run.
    """
    asked = AskedTraining(
        Amounts(tokens, length, steps, seconds(time)), seed, revision, force, device=device, shard=shard
    )
    with host_of(str(model)).family(family):
        if dry_run:
            return planned_training(recipe, model, text, asked)
        with watching("learn", progress, quiet) as watch:
            done = _train(recipe, model, out, text, asked, watch)
        if writes():
            write(out)
    return done


@contextmanager
def watching(name: str, progress: Watcher | None, quiet: bool) -> Iterator[Watcher]:
    """The watcher given, or the bars of the command where somebody can see them."""
    if progress is not None:
        yield progress
        return
    with bars(name, quiet=quiet or not sys.stderr.isatty()) as watch:
        yield watch


def seconds(time: str | float | None) -> float | None:
    """`20m` or seconds → seconds."""
    return amounts.length(time, f"time={time!r}") if isinstance(time, str) else time


def subnets(
    artifact: str | Path,
    subnet: str | Subnet | Sequence[str | Subnet] = (),
    *,
    eval: Where | None = None,
    page: str | Path | None = None,
    seed: int = 0,
    progress: Watcher | None = None,
    quiet: bool = False,
) -> Subnets:
    """Members of a family side by side, with size, speed and quality.

    Args:
        subnet: which; none: every choice by itself, the smallest of all together, and those that have a name.
        eval: text for quality; None: the model samples its own where nothing in it is rounded, else no quality.
        page: a file to write them to as a page, plotted.
    """
    asked = [subnet] if isinstance(subnet, str | Subnet) else subnet
    with watching("measure", progress, quiet) as watch:
        found = _subnets(artifact, asked, eval=eval, seed=seed, progress=watch)
    if page is not None:
        write_page(found, Path(page))
    return found
