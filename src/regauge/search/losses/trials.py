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

from regauge.anatomy.model import Site, Weights
from regauge.hosts.base import Rows
from regauge.hosts.states import States
from regauge.kernels.cpu.machine import trim
from regauge.measure.quality import Scores
from regauge.measure.reading import Read, inputs_of, numbers, scores_of
from regauge.search.losses.shelf import Shelf
from regauge.search.options import Option
from regauge.search.stores import reading, scheme_at
from regauge.search.subject import Subject

Picks = Mapping[str, Option]
"""Group → option; groups that are not named stay as they are."""

STATES = 2**28  # bytes of hidden states that one pass may hold
SMALL = 2**20  # weights of an embedding or a head up to which it is rebuilt once


def true_scores(
    subject: Subject, shelf: Shelf, windows: Read, variants: Sequence[Picks], states: int = STATES
) -> list[Scores]:
    """Scores of every variant against the subject itself on some windows.

    Args:
        states: bytes of hidden states that one pass may hold; with fewer, fewer variants go through at a time.
    """
    size = max(1, states // _bytes(subject, windows) - 1)
    found: list[Scores] = []
    for start in range(0, len(variants), size):
        found += _pass(subject, shelf, windows, variants[start : start + size])
    return found


def true_kl(
    subject: Subject, shelf: Shelf, windows: Read, variants: Sequence[Picks], states: int = STATES
) -> list[float]:
    """Mean KL of every variant, nats a token."""
    return [float(scores.kl_N.mean()) for scores in true_scores(subject, shelf, windows, variants, states)]


@torch.no_grad()
def _pass(subject: Subject, shelf: Shelf, windows: Read, variants: Sequence[Picks]) -> list[Scores]:
    runner = subject.runner
    outer = subject.read(None)
    inputs = inputs_of(windows, subject.batch)
    base = runner.begin(inputs, outer)
    outers = _outers(subject, shelf, variants, outer)
    moved: list[States | None] = [
        base.with_hidden(runner.begin(inputs, own, rows=rows).hidden) if rows or own is not outer else None
        for own, rows in outers
    ]  # None: still on the original's states
    for block in range(subject.blocks):
        weights = subject.read(block)
        after = runner.block(block, weights, base)
        for index, changed in enumerate(shelf.rebuilt(variants, block, subject.products)):
            before, scheme = moved[index], scheme_at(shelf.groups, variants[index], block)
            if before is not None or changed or scheme is not None:
                with reading(runner, scheme):
                    moved[index] = runner.block(block, {**weights, **changed}, before if before is not None else base)
        base = after
        trim()
    tails: list[Iterator[Tensor]] = [
        runner.tail(own, base if states is None else states, rows=rows)
        for (own, rows), states in zip(outers, moved, strict=True)
    ]
    return scores_of(windows, runner.tail(outer, base), tails, subject.batch)


def _bytes(subject: Subject, windows: Read) -> int:
    """Of the states of a variant: of images as large as they are at their largest, behind what lies before blocks."""
    inputs = inputs_of(windows, subject.batch)
    if not subject.pictured:
        return 4 * subject.anatomy.hidden * sum(numbers(batch) for batch in inputs)
    first = subject.runner.begin(inputs[:1], subject.read(None)).hidden[0]
    return max(1, 4 * first.numel() * sum(map(numbers, inputs)) // max(1, numbers(inputs[0])))


def _outers(
    subject: Subject, shelf: Shelf, variants: Sequence[Picks], outer: Weights
) -> list[tuple[Weights, dict[str, Rows]]]:
    """Of each variant, tensors outside the blocks, and what makes the rows of embedding and head, where they change; a
    tied head follows its embedding. Small ones are rebuilt once, large ones whenever some rows are asked for."""
    groups = [group for group in shelf.groups if group.block is None]
    tables = {group.name: site for group in groups for site in group.sites if site.name in ("embed", "head")}
    made: dict[tuple[str, str], Rows] = {}
    found = []
    for picks in variants:
        own = shelf.replaced({name: option for name, option in picks.items() if name not in tables}, None)
        rows = dict[str, Rows]()
        for name, site in tables.items():
            option = picks.get(name)
            if option is None or option.choice is None:
                continue
            if (name, option.name) not in made:
                made[name, option.name] = _rows(shelf.rows(site.name, option, None), site, subject.products)
            rows[site.name] = made[name, option.name]
        if subject.anatomy.tied and "embed" in rows:
            rows["head"] = rows["embed"]
        found.append(({**outer, **own} if own else outer, rows))
    return found


def _rows(make: Rows, site: Site, dtype: torch.dtype) -> Rows:
    if site.shape[0] * site.shape[1] > SMALL:
        return lambda which: make(which).to(dtype)
    whole_OI = make(slice(None)).to(dtype)
    return lambda which: whole_OI[which]
