"""The taps of a block that no matrix reads, while the block runs: attention with their readings, the residual after it,
and the ranges of those whose step is static.

Nothing is folded for them, so weights stay as they are; later blocks see what these readings leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.inner import RESIDUAL, block_of, inner_taps, word_of
from regauge.anatomy.model import Anatomy, Weights
from regauge.attention.reads import Ranges, Read, attended, read
from regauge.engine.taps import waits
from regauge.errors import ModelError
from regauge.formats.readings import Reading, fit
from regauge.formats.transforms import Same
from regauge.hosts.base import Runner
from regauge.hosts.heads import Heads
from regauge.hosts.states import States
from regauge.parts import Point

Inputs = Mapping[str, Point]
Run = Callable[[Tensor, int], Tensor]


def inner_of(anatomy: Anatomy, inputs: Inputs, block: int | None = None) -> list[str]:
    """The taps that no matrix reads and that have a reading, of a block or of all."""
    return [tap for tap in inner_taps(anatomy) if tap in inputs and (block is None or block_of(tap) == block)]


def ranged(anatomy: Anatomy, inputs: Inputs) -> bool:
    """Whether one of them has a step that text must tell."""
    return any(waits(inputs[tap]) for tap in inner_of(anatomy, inputs))


def words(taps: Sequence[str], readings: Mapping[str, Reading]) -> dict[str, Reading]:
    """Last word → reading, of some taps of one block that are settled."""
    return {word_of(tap): readings[tap] for tap in taps if tap in readings}


@contextmanager
def reading(
    runner: Runner,
    readings: Mapping[str, Reading],
    seen: Ranges | None = None,
    stored: Mapping[str, Read] | None = None,
) -> Iterator[None]:
    """While it lasts, attention of a runner's blocks reads as told, and shows what it reads to `seen`.

    Args:
        stored: what a cache gives back, of words without a reading; a family's own attention reads none of it.
    """
    own = {word: one for word, one in readings.items() if word != RESIDUAL}
    inner: dict[str, Read] = {**(stored or {}), **own}
    if not inner and seen is None:
        yield
        return
    causal = runner.anatomy.causal

    def change(heads: Heads) -> Tensor:
        if heads.beyond and seen is None and not own:
            return heads.plain()
        if heads.beyond:
            raise ModelError(
                f"this family's attention has {heads.beyond[0]} beside its softmax, which readings of queries, keys, "
                "values or probabilities do not compute: leave those taps full"
            )
        mask = heads.mask
        if mask is None and not causal:
            mask = torch.ones(1, 1, 1, heads.keys_BKSD.shape[2], dtype=torch.bool, device=heads.keys_BKSD.device)
        see = None if seen is None else seen.see
        given = heads.queries_BHTD, heads.keys_BKSD, heads.values_BKSE
        return attended(given, mask, heads.scale, inner, see)

    with runner.attending(change):
        yield


def bound(runner: Runner, run: Run, readings: Mapping[str, Reading], stored: Mapping[str, Read] | None = None) -> Run:
    """A block as a function, with the readings inside it, and behind a cache."""
    if not readings and not stored:
        return run

    def within(hidden: Tensor, batch: int) -> Tensor:
        with reading(runner, readings, stored=stored):
            return left(run(hidden, batch), readings)

    return within


def left(hidden: Tensor, readings: Mapping[str, Reading]) -> Tensor:
    """What a block gives, as the next reads it."""
    return read(hidden, readings.get(RESIDUAL))


def ranges(runner: Runner, run: Run, states: States, taps: Sequence[str]) -> Ranges:
    """What is seen at some taps of a block, without any reading of them.

    Raises:
        ModelError: attention was not seen, because the family's is none that others compute.
    """
    seen = Ranges()
    with reading(runner, {}, seen):
        for batch, hidden in enumerate(states.hidden):
            seen.see(RESIDUAL, run(hidden, batch))
    missing = [tap for tap in taps if word_of(tap) not in seen.found]
    if missing:
        raise ModelError(
            f"the attention of a {runner.anatomy.family} shows nobody its queries, keys, values and probabilities, so "
            f"{missing[0]} cannot be read otherwise: leave it full"
        )
    return seen


def settled(runner: Runner, states: States, block: int, weights: Weights, inputs: Inputs) -> dict[str, Reading]:
    """Tap → reading, of those of a block whose step is static."""
    waiting = [tap for tap in inner_of(runner.anatomy, inputs, block) if waits(inputs[tap])]
    seen = ranges(runner, runner.bind(block, weights, states), states, waiting)
    return {tap: fit(parts.format_of(inputs[tap]), Same(), seen.stats(word_of(tap))) for tap in waiting}


def run(runner: Runner, block: Callable[[], States], readings: Mapping[str, Reading]) -> States:
    """States behind a block, with the readings inside it, as the next block reads them."""
    with reading(runner, readings):
        states = block()
    if RESIDUAL not in readings:
        return states
    return replace(states, hidden=tuple(left(hidden, readings) for hidden in states.hidden))
