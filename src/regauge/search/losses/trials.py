"""True KL of many variants of one model in a single streamed pass.

A variant is a choice of options; its states are the original's up to the first block that it changes, so single-site
variants of late blocks are cheap. All variants go through a block together, so that a model larger than memory is read
once for a whole set, and what several of them choose is rebuilt once. Nothing is written: the rounded weights come from
the shelf. Cost: one forward pass a variant over the text, from its first change on. Memory: the states of each diverged
variant, and a block of each option in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from regauge.anatomy.model import Weights
from regauge.hosts.states import States
from regauge.measure.quality import Scores, compare_many
from regauge.search.losses.shelf import Shelf
from regauge.search.options import Option
from regauge.search.subject import Subject
from regauge.text.windows import Windows

Picks = Mapping[str, Option]
"""Group → option; groups that are not named stay as they are."""

STATES = 2**29  # bytes of hidden states that one pass may hold


def true_scores(subject: Subject, shelf: Shelf, windows: Windows, variants: Sequence[Picks]) -> list[Scores]:
    """Scores of every variant against the subject itself on some windows."""
    each = 4 * subject.anatomy.hidden * sum(batch.ids_BT.numel() for batch in windows.batches(subject.batch))
    size = max(1, STATES // each - 1)
    found: list[Scores] = []
    for start in range(0, len(variants), size):
        found += _pass(subject, shelf, windows, variants[start : start + size])
    return found


def true_kl(subject: Subject, shelf: Shelf, windows: Windows, variants: Sequence[Picks]) -> list[float]:
    """Mean KL of every variant, nats a token."""
    return [float(scores.kl_N.mean()) for scores in true_scores(subject, shelf, windows, variants)]


@torch.no_grad()
def _pass(subject: Subject, shelf: Shelf, windows: Windows, variants: Sequence[Picks]) -> list[Scores]:
    runner = subject.runner
    outer = subject.read(None)
    inputs = [batch.ids_BT for batch in windows.batches(subject.batch)]
    base = runner.begin(inputs, outer)
    outers = _outers(subject, shelf, variants, outer)
    moved: list[States | None] = [
        runner.begin(inputs, own) if own is not outer else None for own in outers
    ]  # None: still on the original's states
    for block in range(subject.blocks):
        weights = subject.read(block)
        after = runner.block(block, weights, base)
        for index, changed in enumerate(shelf.rebuilt(variants, block, subject.products)):
            before = moved[index]
            if before is not None or changed:
                moved[index] = runner.block(block, {**weights, **changed}, before if before is not None else base)
        base = after
    tails: list[Iterator[Tensor]] = [
        runner.tail(own, base if states is None else states) for own, states in zip(outers, moved, strict=True)
    ]
    return compare_many(windows, runner.tail(outer, base), tails, subject.batch)


def _outers(subject: Subject, shelf: Shelf, variants: Sequence[Picks], outer: Weights) -> list[Weights]:
    """Tensors outside the blocks; a tied head follows its embedding."""
    found = []
    for changed in shelf.rebuilt(variants, None, subject.products):
        if subject.anatomy.tied and "embed.weight" in changed:
            changed["head.weight"] = changed["embed.weight"]
        found.append({**outer, **changed} if changed else outer)
    return found
