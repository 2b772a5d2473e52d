"""Rounds the options that are asked for and not there yet: one more streamed pass over the calibration text.

Every block is run from its border, so blocks of which nothing is missing are passed over. What an option's codes are
does not depend on what else is rounded with it, nor on when.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from regauge.kernels.cpu.machine import trim
from regauge.rounding.pieces import PIECE
from regauge.search.losses.borders import Borders
from regauge.search.losses.shelf import Pair, Shelf, packed
from regauge.search.losses.sites import Wanted, rounded, watching


@dataclass(frozen=True, eq=False)
class Stock:
    """What fills a shelf.

    Attributes:
        at_once: how many matrices are rounded at the same time; None: as many as there are threads.
    """

    shelf: Shelf
    borders: Borders
    at_once: int | None = None

    @torch.no_grad()
    def __call__(self, pairs: Iterable[Pair]) -> None:
        """Sees to it that some options are on the shelf."""
        missing, borders = self.shelf.missing(pairs), self.borders
        subject = borders.subject
        for count, (block, wanted) in enumerate(missing.items()):
            borders.say("rounding", count / len(missing))
            seen, weights = watching(wanted), subject.read(block)
            if seen.watch and block is None:
                for _ in subject.quick.tail(weights, borders.before(subject.blocks), watch=seen.watch):
                    pass
            elif seen.watch and block is not None:
                subject.quick.show(block, weights, borders.before(block), seen.watch)
            stats = seen.finish(subject.anatomy.sites)[0]
            for some in _shares(wanted):
                self.shelf.fill(block, rounded(some, weights, stats, packed, self.at_once))
            del stats, weights
            trim()


def _shares(wanted: Wanted) -> list[Wanted]:
    """All together; embedding and head of a large vocabulary one option at a time, for each is as large as blocks."""
    sites = [site for group, _ in wanted for site in group.sites]
    large = wanted[0][0].block is None and sum(site.shape[0] * site.shape[1] for site in sites) > PIECE
    return [[one] for one in wanted] if large else [wanted]
