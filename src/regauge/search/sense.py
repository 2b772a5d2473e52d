"""How much each matrix matters: what `inspect --sensitivity` prints. The search does the same with many options."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from regauge.engine.watchdog import Clock, Watcher, nobody, quiet_torch
from regauge.errors import ModelError
from regauge.hosts import host_of
from regauge.search.loop.start import backward
from regauge.search.losses.borders import Borders
from regauge.search.losses.fisher import fisher
from regauge.search.options import SiteGroup, site_groups
from regauge.search.subject import Subject, predicting, reader
from regauge.text.corpora import Where
from regauge.text.split import Sizes, prepare

TOKENS, GRADIENT = 8192, 2048  # calibration tokens read; those of the backward pass


@dataclass(frozen=True)
class Sensed:
    """One matrix, or those that share a choice (the experts of a block).

    Attributes:
        kl: predicted KL to the original in nats a token, were it alone rounded to `option`.
    """

    name: str
    kind: str
    block: int | None
    option: str
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """Every matrix of the blocks, and what the figures were read from."""

    sites: tuple[Sensed, ...]
    tokens: int
    text: str
    notes: tuple[str, ...]


def sensitivity(
    model: str | Path,
    bits: int = 4,
    calibration: Where | None = None,
    seed: int = 0,
    revision: str | None = None,
    progress: Watcher | None = None,
) -> Sensitivity:
    """Predicts what rounding each matrix alone would cost. Embedding and head are left to `fit`, which measures them.

    Cost: a forward and a backward pass over a few thousand tokens. Raises TextError, ModelError.
    """
    clock = Clock(progress or nobody)
    with quiet_torch(), tempfile.TemporaryDirectory(prefix="regauge-") as folder:
        clock.say("open")
        source = host_of(model).open(model, revision)
        if predicting(source) is not None:
            raise ModelError(
                f"sensitivity is predicted on text, and {source.path.name} is a model of images: fit has it"
            )
        texts = prepare(reader(source, seed), calibration, None, Sizes(TOKENS, 512, 512), seed)
        groups = tuple(
            SiteGroup(group.name, group.sites, group.options[:1])
            for group in site_groups(source.anatomy, (bits,), full=False)
            if group.block is not None
        )
        subject = Subject.of(source)
        inputs = texts.batches(TOKENS, subject.batch)

        def show(step: str, share: float) -> None:
            clock.show(step, int(100 * share), 100)

        borders = Borders(subject, inputs, Path(folder), show)
        found = fisher(borders, groups, backward(inputs, GRADIENT), seed, show)
    sites = tuple(
        Sensed(group.name, group.sites[0].kind, group.block, option.name, found[group.name][option.name])
        for group in groups
        for option in group.options
    )
    return Sensitivity(sites, texts.tokens, texts.records[0].description, texts.notes)
