"""One line of the table of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge.parts.points import WEIGHTS


@dataclass(frozen=True)
class Part:
    """One line of the table.

    Attributes:
        path: `package.module:Name` of the constructor.
        what: what it does, in a line.
        cite: arXiv ids or a specification.
        fixed: options that the name itself fixes; a recipe cannot set them.
        short: the option that `name:value` sets.
        places: where it may be used.
        wants: axis → the parts of it that this one works through; any other beside it is a contradiction.
        refuses: axis → parts of it that cannot stand beside this one, and why.
        offers: place → spellings under which the search tries it there. A grid's spellings are the grains beside which
            it is tried; of every other axis the search takes the last part that a place can serve.
        beside: axis → the part of it that the search puts beside this one, where it is another than it takes elsewhere.
        term: the kind of term that it adds to a matrix, "" for none.
        text: whether it reads calibration text.
        cost: what it costs to use, in a line; "" where it costs nothing to speak of.
    """

    path: str
    what: str
    cite: str = ""
    fixed: Mapping[str, object] = field(default_factory=dict)
    short: str = ""
    places: tuple[str, ...] = (WEIGHTS,)
    wants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refuses: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    offers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    term: str = ""
    text: bool = False
    cost: str = ""
