"""Plans: ordered rules (selector → coordinates) as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge.parts import Choice, Spec


@dataclass(frozen=True)
class Rule:
    """Sites whose canonical name matches `select` take `choice` (None: full precision). The last match wins."""

    select: str
    choice: Choice | None


@dataclass(frozen=True)
class Plan:
    """A recipe: rewrites in order, then rules.

    Attributes:
        name: the preset's, or what the recipe calls itself.
        rules: the last that matches a site wins; a site that none matches stays in full precision.
        rewrites: function-preserving moves, in the order in which they are made.
        title: what it is, in a line.
        cite: papers, `arXiv:2210.17323`.
        differs: where we differ from the publication.
        calibration: `tokens` and `length` of the text that the method reads, where it reads any.
    """

    name: str
    rules: tuple[Rule, ...]
    rewrites: tuple[Spec, ...] = ()
    title: str = ""
    cite: tuple[str, ...] = ()
    differs: str = ""
    calibration: Mapping[str, int] = field(default_factory=dict)
