"""The loop: guesses are read behind the last token in one step, and stay as far as they would have come alone.

Each token is chosen from its own logits, in order, by the same function as without drafts, and a guess is right if it
is the token that was chosen. So greedy text is the same, and so is sampled text, given the same random numbers: none is
drawn for a guess. What a wrong guess left in the cache is taken back before its successor is read.

Legend: Q tokens read in one step, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from regauge.runtime.drafts.pace import Pace
from regauge.runtime.drafts.source import Source
from regauge.runtime.drafts.worth import MOST


@runtime_checkable
class Target(Protocol):
    """The model whose text it is, on its cache."""

    def step(self, ids: Sequence[int]) -> Tensor:
        """Logits (Q, V) of so many tokens behind what the cache holds."""

    def back(self, tokens: int) -> None:
        """Takes the last tokens back, which may be none: a step is over."""

    def together(self, most: int) -> int:
        """How many tokens, of `most`, may be read at once so that each sees what it would see alone."""


def drafted(
    target: Target, source: Source, pace: Pace, logits_V: Tensor, pick: Callable[[Tensor], int], most: int
) -> Iterator[int]:
    """Tokens, one at a time.

    Args:
        source: knows the text so far.
        logits_V: of the first token to come.
        pick: logits (V,) → the token.
        most: tokens to come.
    """
    token, costs, clock = pick(logits_V), pace.costs, pace.costs.clock
    pace.came(token)
    left = most - 1
    yield token
    while left > 0:
        source.extend((token,))
        asked = _guesses(target, source, pace, left)
        start = clock()
        logits_QV = target.step((token, *asked))
        costs.took(1 + len(asked), clock() - start)
        costs.drafted += len(asked)
        right = 0
        try:
            for right in range(len(asked) + 1):
                token = pick(logits_QV[right])
                pace.came(token)
                left -= 1
                yield token
                if right == len(asked) or token != asked[right] or left == 0:
                    break
                source.extend((token,))
        finally:
            costs.accepted += right
            target.back(len(asked) - right)


def _guesses(target: Target, source: Source, pace: Pace, left: int) -> tuple[int, ...]:
    """Those that are tried now. None is worth anything for the last token."""
    room = min(left - 1, target.together(MOST + 1) - 1)
    if source.free:
        draft = source.propose(MOST)
        pace.tried(draft)
        return draft.tokens[: pace.length(draft.matched, min(room, len(draft.tokens)), True)]
    length = pace.length(0, room, False)
    if not length:
        return ()
    costs = pace.costs
    start = costs.clock()
    draft = source.propose(length)
    if draft.tokens:
        costs.guessed(len(draft.tokens), costs.clock() - start)
    pace.tried(draft)
    return draft.tokens
