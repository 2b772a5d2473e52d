"""How long the windows of text are that a model is shown, and how many it needs."""

from __future__ import annotations

from regauge.errors import TextError

LEAST = 16  # tokens of a window
LARGE = 100_000_000  # parameters from which windows have 512 tokens


def window_length(parameters: int, most: int | None) -> int:
    """Tokens of a window: 256 for small models, 512 for others, never more than the model reads."""
    wanted = 512 if parameters >= LARGE else 256
    return wanted if most is None else min(wanted, most)


def asked_length(asked: int | None, parameters: int, most: int | None) -> int:
    """Tokens of a window as the user says, or as the model's size has it.

    Raises:
        TextError: they are more than the model reads at once, or too few to hold text.
    """
    if asked is None:
        return window_length(parameters, most)
    if most is not None and asked > most:
        raise TextError(f"windows of {asked} tokens are longer than the {most} that the model reads at once.")
    if asked < LEAST:
        raise TextError(f"windows of {asked} tokens hold too little text; give --length {LEAST} or more.")
    return asked


def enough_for(tokens: int | None, length: int) -> None:
    """Refuses calibration tokens that are not two windows, before any work.

    Raises:
        TextError: says how many would do.
    """
    if tokens is not None and tokens < 2 * length:
        raise TextError(
            f"--tokens {tokens} is less than two windows of {length} tokens; give {2 * length} or more, or a shorter "
            "--length."
        )
