"""How many guesses to make: as many as promise the most tokens a second.

Guesses whose first is right with probability p and each further one with q give 1 + p + p·q + … + p·q^(g-1) tokens a
step of g + 1 tokens (arXiv 2211.17192, of which this is the case that a right guess is the token that was chosen).
"""

from __future__ import annotations

from collections.abc import Callable

MOST = 7
"""Tokens that are drafted at once: with the one before them they are eight, which share one reading of the weights."""
GAIN = 1.03
"""Drafts are tried where they promise so much more than none."""


def best(
    first: float, further: float, step: Callable[[int], float], guess: float, most: int = MOST
) -> tuple[int, float]:
    """So many guesses, and how many times as many tokens a second they promise; 0 and 1 where none are worth it.

    Args:
        first, further: how often the first guess is right, and each behind right ones.
        step: tokens → seconds of a step that reads so many.
        guess: seconds of a guess.
    """
    alone = step(1)
    found, gain, tokens, chance = 0, GAIN, 1.0, first
    for guesses in range(1, min(most, MOST) + 1):
        tokens += chance
        chance *= further
        now = tokens * alone / (step(guesses + 1) + guesses * guess)
        if now > gain:
            found, gain = guesses, now
    return found, gain if found else 1.0
