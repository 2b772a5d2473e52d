"""Edits of a text of tokens, as data: what is taken out, what is put in, and which stretches of the old text stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from operator import index
from typing import Any, NamedTuple

from regauge.errors import SettingError


class Edit(NamedTuple):
    """One change of a text.

    Attributes:
        at: the token before which it happens, counted in the old text, from 0; its length: at the end.
        remove: how many tokens go, from `at` on.
        insert: ids that come in their place: a list, or a tensor (n,) or (B, n).
    """

    at: int
    remove: int = 0
    insert: Any = ()


@dataclass(frozen=True)
class Piece:
    """New ids, and the stretch of the old text that follows them: a text that was edited is a row of these.

    Attributes:
        inserts: what is new, an item an edit.
        start, stop: of the old text.
    """

    inserts: tuple[Any, ...]
    start: int
    stop: int


def pieces(edits: Sequence[Sequence[Any]], length: int, first: int = 0) -> list[Piece]:
    """The text after its edits, from the front.

    Args:
        edits: (at, remove, insert) in any order, of which the last or the last two may be left out; what is inserted
            at one place comes in the order given.
        length: tokens of the old text.
        first: the first token that may be edited; what lies before it is padding.

    Raises:
        SettingError: an edit lies outside of the text or over another, or is no edit.
    """
    found: list[Piece] = []
    inserts: list[Any] = []
    begun = 0
    for edit in sorted((_edit(one, length, first) for one in edits), key=lambda one: (one.at, one.remove > 0)):
        if edit.at < begun:
            raise SettingError(f"two edits touch token {edit.at}; edits count in the old text and lie apart")
        if edit.at > begun:
            found.append(Piece(tuple(inserts), begun, edit.at))
            inserts = []
        inserts.append(edit.insert)
        begun = edit.at + edit.remove
    return [*found, Piece(tuple(inserts), begun, length)]


def _edit(one: Sequence[Any], length: int, first: int) -> Edit:
    try:
        edit = Edit(*one)
        edit = edit._replace(at=index(edit.at), remove=index(edit.remove))
    except TypeError:
        raise SettingError(f"an edit is (at, remove, insert), two numbers and ids, not {str(one)[:60]}") from None
    if edit.remove < 0 or edit.at < 0 or edit.at + edit.remove > length:
        raise SettingError(
            f"there are no {edit.remove} tokens from {edit.at} on in a text of {length}; edits count from 0 in the old "
            "text"
        )
    if edit.at < first:
        raise SettingError(f"token {edit.at} is padding: what can be edited begins at {first}")
    return edit


def changes(old: Sequence[int], new: Sequence[int]) -> list[Edit]:
    """The edits that make one text of ids another: what both begin and end with is found first, and of what lies
    between the longest stretches that both have.

        rg.cache.changes([5, 6, 7, 8], [5, 9, 9, 8])   # → [Edit(at=1, remove=2, insert=[9, 9])]
    """
    most = min(len(old), len(new))
    begin = next((n for n in range(most) if old[n] != new[n]), most)
    end = next((n for n in range(most - begin) if old[len(old) - 1 - n] != new[len(new) - 1 - n]), most - begin)
    before, after = old[begin : len(old) - end], new[begin : len(new) - end]
    found = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [Edit(begin + a, b - a, list(after[c:d])) for kind, a, b, c, d in found if kind != "equal"]
