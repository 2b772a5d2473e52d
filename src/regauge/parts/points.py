"""Places and their axes, declared here and nowhere else: what a rule of a recipe can be about, and what it can say.

Parser, printer, hash, difference, resolver, header, receipts, `explain`, the search's menu and the laws read this
declaration. A new axis is one line here; what can stand on it is the table of parts (`table.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from regauge.errors import RecipeError, nearest
from regauge.parts.spec import Spec


@dataclass(frozen=True)
class Axis:
    """One axis of a place.

    Attributes:
        name: as a recipe writes it.
        table: which table of parts its names are from, where that is not the axis's own.
        default: the spelling that is taken where a recipe says nothing; "" for none.
        required: whether a rule must say it.
        number: whether a recipe may write a bare number.
        decodes: whether codes are decoded by it; other axes say how codes come about.
        what: what it decides, in a line.
    """

    name: str
    what: str
    table: str = ""
    default: str = ""
    required: bool = False
    number: bool = False
    decodes: bool = False

    @property
    def parts(self) -> str:
        """The table that its names are from."""
        return self.table or self.name


@dataclass(frozen=True)
class Place:
    """A kind of place.

    Attributes:
        of: what its rules are about, one and many.
        like: a selector as a recipe writes it.
        acts: whether anything acts on such a place today; where not, a recipe is read, resolved and then refused.
        scales: whether something acts on it in models that draw images scale by scale.
    """

    name: str
    of: tuple[str, str]
    like: str
    axes: tuple[Axis, ...]
    acts: bool = False
    scales: bool = False


FORMAT = "format"
"""The table of formats in one word: a grid and a grain, `int2-asym/time:32`."""
FORMATS = (
    Axis("grid", "which numbers exist", required=True, decodes=True),
    Axis("grain", "which elements share a step", required=True, decodes=True),
    Axis("ranger", "how big a step is", default="ends"),
    Axis("scale", "how a step is stored", default="f16", decodes=True),
)
"""The axes of such a format; the two that must be said make the word."""
WORD = tuple(axis.name for axis in FORMATS if axis.required)

_DECLARED = (
    Place(
        "weights",
        ("site", "sites"),
        "blocks.*.attn.q",
        (
            Axis("grid", "which numbers exist", required=True, decodes=True),
            Axis("grain", "which weights share a step", required=True, decodes=True),
            Axis("ranger", "how big a step is", default="minmax"),
            Axis("scale", "how a step is stored", default="bf16", decodes=True),
            Axis("rounder", "which code each weight takes", default="nearest"),
            Axis("compensator", "what is added back for the error"),
        ),
        acts=True,
    ),
    Place(
        "inputs",
        ("tap", "taps"),
        "blocks.*.mlp.hidden",
        (
            Axis("transform", "what the activation is multiplied by first", default="identity"),
            Axis("grid", "which numbers exist", required=True),
            Axis("grain", "which elements share a step", default="token"),
            Axis("ranger", "how big a step is, and when that is known", default="dynamic"),
            Axis("scale", "how a step is stored", default="f32"),
        ),
        acts=True,
    ),
    Place(
        "cache",
        ("store", "stores"),
        "blocks.*.cache",
        (
            Axis("keys", "the format of what is kept of the keys", FORMAT),
            Axis("values", "the format of what is kept of the values", FORMAT),
            Axis("window", "how many of the last tokens stay whole", number=True),
            Axis("transform", "what keys and values are turned by before they are rounded"),
            Axis("balance", "what evens tokens and channels out before they are rounded"),
            Axis("score", "which tokens matter: higher is kept"),
            Axis("budget", "how many tokens each head keeps", number=True),
            Axis("disposal", "what becomes of the others"),
            Axis("merge", "what is kept of several layers in one"),
            Axis("trigger", "when tokens are let go"),
        ),
        acts=True,
    ),
    Place(
        "attention",
        ("block's attention", "blocks' attention"),
        "blocks.3.attention",
        (
            Axis("share", "which blocks take the attention probabilities of an earlier one, and drop queries and keys"),
            Axis("window", "how many of the last tokens heads see", number=True),
        ),
        acts=True,
    ),
    Place(
        "shape",
        ("stream or block", "streams and blocks"),
        "blocks.*.ffn",
        (
            Axis("unit", "what is taken out as one", required=True),
            Axis("score", "which units matter: higher is kept", default="activation"),
            Axis("allocation", "how many stay where", default="uniform"),
            Axis("schedule", "in how many steps", default="once"),
            Axis("repair", "what is done to the weights that read those that stay", default="none"),
        ),
        acts=True,
    ),
    Place(
        "tokens",
        ("residual", "residuals between blocks"),
        "blocks.2.residual",
        (
            Axis("score", "which tokens matter: higher is kept", required=True),
            Axis("schedule", "how many stay, and from which block"),
            Axis("disposal", "what becomes of the others"),
        ),
        scales=True,
    ),
)

PLACES: Mapping[str, Place] = {place.name: place for place in _DECLARED}
AXES: Mapping[str, tuple[str, ...]] = {place.name: tuple(axis.name for axis in place.axes) for place in _DECLARED}
"""Place → its axes, in the order in which a point is printed."""
WEIGHTS, INPUTS, CACHE, ATTENTION, SHAPE, TOKENS = "weights", "inputs", "cache", "attention", "shape", "tokens"
REWRITES = "rewrites"
"""Where rewrites stand in a recipe: no place, but a list of their own."""
ARITHMETIC, MEASURE = "arithmetic", "measure"
"""What `measure --arithmetic` names: how a model's products are taken while it is measured; in no recipe."""


def place_of(name: str) -> Place:
    """The declaration of a place.

    Raises:
        RecipeError: there is no such place; names the nearest.
    """
    if name not in PLACES:
        raise RecipeError(f"there is no place {name!r}{nearest(name, PLACES)}")
    return PLACES[name]


def axis_of(place: str, name: str) -> Axis:
    """The declaration of one axis.

    Raises:
        RecipeError: the place has no such axis; names the nearest.
    """
    for axis in place_of(place).axes:
        if axis.name == name:
            return axis
    raise RecipeError(f"{place} have no axis {name!r}{nearest(name, AXES[place])}")


def numeric(axis: Axis, spec: Spec) -> bool:
    """Whether a coordinate is a bare number, which names no part."""
    if not axis.number or spec.options:
        return False
    try:
        return math.isfinite(float(spec.part))
    except ValueError:
        return False


def tables() -> tuple[str, ...]:
    """Every table that an axis takes its names from, in the order of the declaration."""
    return tuple(dict.fromkeys(axis.parts for place in _DECLARED for axis in place.axes))


@dataclass(frozen=True)
class Point:
    """The coordinates of one place: one part an axis, absent where the rule says nothing. Hashable.

    Attributes:
        place: one of `PLACES`.
        specs: (axis, part) in the order of the declaration.
    """

    place: str
    specs: tuple[tuple[str, Spec], ...]

    def __post_init__(self) -> None:
        given = dict(self.specs)
        place_of(self.place)
        for name in given:
            axis_of(self.place, name)
        ordered = tuple((name, given[name]) for name in AXES[self.place] if name in given)
        object.__setattr__(self, "specs", ordered)

    @staticmethod
    def of(place: str, specs: Mapping[str, Spec | None]) -> Point:
        """A point of some coordinates; None is the same as absent."""
        return Point(place, tuple((name, spec) for name, spec in specs.items() if spec is not None))

    @cached_property
    def _by_axis(self) -> dict[str, Spec]:
        return dict(self.specs)

    def __getitem__(self, axis: str) -> Spec | None:
        """The part on an axis, None where the point says nothing of it.

        Raises:
            RecipeError: the place has no such axis.
        """
        axis_of(self.place, axis)
        return self._by_axis.get(axis)

    def __iter__(self) -> Iterator[tuple[str, Spec]]:
        return iter(self.specs)

    def spec(self, axis: str) -> Spec:
        """The part on an axis that the point must have.

        Raises:
            RecipeError: it has none there.
        """
        found = self[axis]
        if found is None:
            raise RecipeError(f"{self.place} need a {axis}, and this point has none")
        return found

    def name(self, axis: str) -> str:
        """The name of the part on an axis, "" where there is none."""
        found = self[axis]
        return "" if found is None else found.part

    def but(self, **changes: Spec | None) -> Point:
        """The same point with other parts on some axes; None takes a part away."""
        return Point.of(self.place, {**self._by_axis, **changes})
