"""When tokens are chosen: after the prefill, every so many tokens, or when a head holds so many."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from regauge.errors import BudgetError


@runtime_checkable
class Trigger(Protocol):
    """When tokens are chosen.

    Attributes:
        kind: `prefill` (once, when the whole prompt has been read), `every` (and then after every `tokens`), or `at`
            (whenever the fullest head holds `tokens` or more).
        tokens: of `every` and `at`.
    """

    @property
    def kind(self) -> str: ...

    @property
    def tokens(self) -> int: ...


def due(trigger: Trigger, seen: int, chosen_at: int, held: int) -> bool:
    """Whether to choose now, after `seen` tokens.

    Args:
        seen: tokens of the text so far.
        chosen_at: how many had been seen when it was last done; 0: never.
        held: tokens of the fullest head.
    """
    if trigger.kind == "at":
        return held >= trigger.tokens
    return not chosen_at or (trigger.kind == "every" and seen - chosen_at >= trigger.tokens)


def check_tokens(kept: int, window: int, sinks: int, block: int, at: int = 0) -> None:
    """What a budget of so many tokens a head must hold, and a size that is to trigger a choice.

    Args:
        kept: the budget.
        window: newest tokens that stay.
        sinks: tokens at the front that are never taken; whole blocks hold them.
        block: tokens of a block, which fills behind the window.
        at: the size that triggers; 0: another trigger.

    Raises:
        BudgetError: they do not fit.
    """
    front = -(-max(sinks, 1) // block) * block
    least = window + block + front
    if kept < least:
        raise BudgetError(
            f"a budget of {kept} tokens a head cannot hold its window of {window}, a block of {block} that fills, and "
            f"{front} for {sinks} sinks: write {least} or more, or a smaller window"
        )
    if at and at < kept + block:
        raise BudgetError(
            f"tokens are to be chosen when a head holds {at}, and the budget keeps {kept} and a block of {block} "
            f"fills: write at:{kept + block} or more"
        )
