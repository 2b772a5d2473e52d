"""Plans: what each place becomes, as ordered rules (selector → point), frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge.elastic.family import Family
from regauge.parts import PLACES, WEIGHTS, Point, Spec

INTEGER = "integer"
PROMISES = (INTEGER,)
"""What `products` may say."""
ANEW = ("anew",)
"""What `statistics` may say."""


@dataclass(frozen=True)
class Rule:
    """Places that `select` matches take `point` (None: they stay as they are). The last match wins."""

    select: str
    point: Point | None


@dataclass(frozen=True)
class Plan:
    """A recipe: rewrites in order, then the rules of each place.

    Attributes:
        name: the preset's, or what the recipe calls itself.
        places: place → its rules; the last that matches wins, and what none matches stays as it is.
        rewrites: function-preserving moves, in the order in which they are made.
        title: what it is, in a line.
        cite: papers, `arXiv:2210.17323`.
        differs: where we differ from the publication.
        row: the row of the list of methods that it implements, or why there is none.
        check: tests that fail where its idea is taken out, `tests/discriminate/test_x.py::test_y`.
        calibration: `tokens` and `length` of the text that the method reads, where it reads any.
        products: `integer` where every product of matrices must be one of integers; "" where nothing is promised.
        statistics: `anew` where batch norms are given those of calibration images once weights are rounded; "": as they
            were.
        learning: how parts that are learnt are trained, where the recipe says so (`learn/settings.py`).
        train: how a family is trained, where it is (`learn/training.py`).
        family: what may be chosen of the artifact when it runs; None: it is one model.
    """

    name: str
    places: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    rewrites: tuple[Spec, ...] = ()
    title: str = ""
    cite: tuple[str, ...] = ()
    differs: str = ""
    row: str = ""
    check: tuple[str, ...] = ()
    calibration: Mapping[str, int] = field(default_factory=dict)
    learning: Mapping[str, int | str] = field(default_factory=dict)
    products: str = ""
    statistics: str = ""
    family: Family | None = None
    train: Mapping[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        strange = [place for place in self.places if place not in PLACES]
        assert not strange, f"there is no place {strange}"
        ordered = {place: tuple(self.places[place]) for place in PLACES if self.places.get(place)}
        object.__setattr__(self, "places", ordered)

    def of(self, place: str) -> tuple[Rule, ...]:
        """The rules of one place."""
        return self.places.get(place, ())

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the weights."""
        return self.of(WEIGHTS)
