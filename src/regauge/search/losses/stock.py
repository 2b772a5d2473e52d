"""Rounds the options that are asked for and not there yet: one more streamed pass over the calibration text.

Every block is run from its border, so blocks of which nothing is missing are passed over. What an option's codes are
does not depend on what else is rounded with it, nor on when.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from regauge.search.losses.borders import Borders
from regauge.search.losses.shelf import Pair, Shelf, packed
from regauge.search.losses.sites import rounded, watching


@dataclass(frozen=True, eq=False)
class Stock:
    """What fills a shelf."""

    shelf: Shelf
    borders: Borders

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
            for some in [wanted] if block is not None else [[one] for one in wanted]:  # outside matrices are large
                self.shelf.fill(block, rounded(some, weights, stats, packed))
