"""What a loop over one block will cost, before it begins. An estimate, scaled up from a speed measured elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from regauge.learn.settings import Settings


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes of memory beside the block and its states."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        weights: of the block that run for a token (two experts of many).
        trained: weights that pass through a part that is learnt.
        parameters: numbers that are trained.
        width: the sum of what all matrices of the block read and write for a token.
        tokens: of the text.
    """

    weights: int
    trained: int
    parameters: int
    width: int
    tokens: int


PASSES = 40  # over the weights in a step: a dozen forward, twice that backward
PER_WEIGHT = 1.5e-10  # seconds of one of them, for one weight, in cache


def cost(size: Size, settings: Settings, flop: float) -> Cost:
    """The most that a block takes: no early stop.

    Args:
        flop: seconds of one multiply or add in a product of matrices on this machine.
    """
    batch = min(settings.batch, size.tokens) or 1
    readings = 2 + settings.steps * batch // max(size.tokens, 1)
    forward = 2 * size.weights * flop * 1.5  # seconds a token, attention and norms included
    seconds = settings.steps * (3 * forward * batch + PASSES * PER_WEIGHT * size.trained)
    seconds += readings * (forward * size.tokens + PASSES / 3 * PER_WEIGHT * size.trained)
    held = 4 * (8 * size.trained + 5 * size.parameters + 3 * size.width * batch)
    return Cost(seconds, held)
