"""Prompt look-up: what followed the last tokens of a text when they stood in it before.

The longest match counts, of three tokens, two or one, and of equal ones the latest: it is likelier to go on the same
than the first. A continuation that runs into the end of the text goes on with itself, as a repeated line does. Cost:
three look-ups a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from regauge.runtime.drafts.source import Draft

LONGEST = 3
"""Tokens by which a place is found."""
REACH = 8
"""Matching tokens that are counted at most: the more match, the likelier is what followed."""


class Lookup:
    """A text that is looked up in itself.

    Attributes:
        free: guesses cost nothing.
    """

    free: ClassVar[bool] = True

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # last tokens → the place behind their last occurrence
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """More of the text."""
        text, after = self._ids, self._after
        for token in ids:
            place = len(text)
            for size in range(1, min(LONGEST, place) + 1):
                after[tuple(text[place - size :])] = place
            text.append(token)

    def propose(self, most: int) -> Draft:
        """So many tokens that may come next; none where nothing matches."""
        text = self._ids
        for size in range(min(LONGEST, len(text)), 0, -1):
            place = self._after.get(tuple(text[-size:]))
            if place is not None:
                found = text[place : place + most]
                while len(found) < most:  # it runs into the end of the text
                    found.append(found[len(found) - (len(text) - place)])
                return Draft(tuple(found), self._matched(place, size))
        return Draft((), 0)

    def _matched(self, place: int, size: int) -> int:
        """How many tokens before a place are those at the end of the text."""
        text, end = self._ids, len(self._ids)
        while size < REACH and size < place and text[place - size - 1] == text[end - size - 1]:
            size += 1
        return size
