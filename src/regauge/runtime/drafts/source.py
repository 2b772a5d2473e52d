"""What guesses the next tokens of a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable


@dataclass(frozen=True)
class Draft:
    """Guesses.

    Attributes:
        tokens: what may come next, in order.
        matched: how good they are likely to be, as an integer from 0 on: guesses of one number are compared with each
            other alone.
    """

    tokens: tuple[int, ...]
    matched: int = 0


@runtime_checkable
class Source(Protocol):
    """Something that drafts.

    Attributes:
        free: whether guesses cost next to nothing, so that they may be made to be looked at only.
    """

    free: ClassVar[bool]

    def extend(self, ids: Iterable[int]) -> None:
        """More of the text, which is certain."""

    def propose(self, most: int) -> Draft:
        """So many guesses, or fewer."""
