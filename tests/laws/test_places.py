"""Laws of places, drawn from the declaration of axes and the table of parts: what parses prints back, for all five."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regauge import parts
from regauge.parts import AXES, FORMAT, PLACES, TABLE, Axis, Point, Spec
from regauge.plan import Plan, Rule, coordinates, diff, digest, dump, parse

WORDS = st.text("abcdefgh-.:0123456789 {}[]#'\"é", min_size=1, max_size=12).filter(lambda text: text == text.strip())
SELECTS = st.one_of(st.sampled_from(["*", "blocks.*", "blocks.3.cache", "kind:ffn | blocks.{0,1}.ffn"]), WORDS)
NUMBERS = st.one_of(st.integers(1, 999), st.floats(0.01, 9.0, allow_nan=False).map(lambda value: round(value, 3)))


def known(axis: Axis, place: str) -> list[Spec]:
    """Every part that may stand on an axis, each with its main option where it has one."""
    if axis.parts == FORMAT:
        grids, grains = (known(Axis(name, ""), place) for name in ("grid", "grain"))
        words = [f"{parts.spell('grid', a)}/{parts.spell('grain', b)}" for a, b in itertools.product(grids, grains)]
        return [Spec(word) for word in words[::7]] + [Spec(words[0], (("ranger", "dynamic"), ("scale", "f16")))]
    found = []
    for name, part in TABLE.get(axis.parts, {}).items():
        if place in part.places:
            needed = part.short and parts.options(axis.parts, name)[part.short].default is inspect.Parameter.empty
            found.append(parts.read(axis.parts, f"{name}:8" if needed else name, place))
    return found


KNOWN = {(place, axis.name): known(axis, place) for place in PLACES for axis in PLACES[place].axes}


EMPTY = {key for key, found in KNOWN.items() if not found}
Raw = tuple[str, tuple[tuple[str, Any], ...]]
"""A spec as drawn. Strategies call nothing of ours: the checks of types under pytest draw from `random` themselves."""


def raw_specs(place: str, axis: Axis) -> st.SearchStrategy[Raw]:
    """A part of an axis; any word at all where it has no parts yet."""
    options = st.dictionaries(st.sampled_from(["a", "share"]), st.one_of(NUMBERS, WORDS, st.booleans()), max_size=2)
    words = st.builds(lambda name, more: (name, tuple(sorted(more.items()))), WORDS, options)
    parts_ = st.sampled_from([(spec.part, spec.options) for spec in KNOWN[place, axis.name]] or [("", ())])
    numbers = NUMBERS.map(lambda value: (str(value), ()))
    named = words if (place, axis.name) in EMPTY else parts_
    return st.one_of(named, numbers) if axis.number else named


def raw_points(place: str) -> st.SearchStrategy[dict[str, Raw]]:
    axes = {axis: raw_specs(place, axis) for axis in PLACES[place].axes}
    must = {axis.name: drawn for axis, drawn in axes.items() if axis.required or axis.default}
    rest = {axis.name: drawn for axis, drawn in axes.items() if axis.name not in must}
    return st.fixed_dictionaries(must, optional=rest).filter(bool)


RAW = {
    place: st.lists(
        st.tuples(SELECTS, st.one_of(st.none(), raw_points(place))),
        min_size=1,
        max_size=3,
        unique_by=lambda row: row[0],
    )
    for place in PLACES
}


@given(name=WORDS, title=st.one_of(st.just(""), WORDS), drawn=st.fixed_dictionaries({}, optional=RAW).filter(bool))
@settings(max_examples=60, deadline=None)
def test_what_is_printed_is_read_back(name: str, title: str, drawn: dict[str, list[tuple[str, Any]]]) -> None:
    def point(place: str, raw: dict[str, Raw] | None) -> Point | None:
        return None if raw is None else Point.of(place, {axis: Spec(*spec) for axis, spec in raw.items()})

    rules = {place: tuple(Rule(select, point(place, raw)) for select, raw in rows) for place, rows in drawn.items()}
    plan = Plan(name=name, places=rules, title=title)
    text = dump(plan)
    again = parse(text)
    assert again == plan
    assert dump(again) == text
    assert digest(again) == digest(plan)
    assert diff(again, plan) == ()


@pytest.mark.parametrize("place", list(PLACES))
def test_every_place_counts_in_hash_and_difference(place: str) -> None:
    one, other = _points(place)
    a, b = (Plan("x", {place: (Rule("blocks.*", point),)}) for point in (one, other))
    kept = Plan("x", {place: (Rule("blocks.*", None),)})
    assert len({digest(plan) for plan in (a, b, kept)}) == 3
    (line,) = diff(a, b)
    assert line.startswith(f"{place} › blocks.*: ")
    assert diff(a, kept)[0].endswith("→ full")


def _points(place: str) -> tuple[Point, Point]:
    """Two points of a place that differ on one axis."""
    axes = [axis for axis in PLACES[place].axes if axis.required or axis.default] or list(PLACES[place].axes[:1])
    every = {axis.name: KNOWN[place, axis.name] or [Spec("one"), Spec("two")] for axis in axes}
    moving = next(name for name, found in every.items() if len(found) > 1)
    first = {name: found[0] for name, found in every.items()}
    return Point.of(place, first), Point.of(place, first | {moving: every[moving][1]})


@pytest.mark.parametrize(("place", "axis"), [(place, axis) for place, axes in AXES.items() for axis in axes])
def test_every_axis_is_read_in_its_order(place: str, axis: str) -> None:
    declared = PLACES[place].axes
    every = {item.name: (KNOWN[place, item.name] or [Spec("word")])[0] for item in declared}
    point = Point.of(place, dict(reversed(every.items())))
    assert tuple(coordinates(point)) == AXES[place]
    assert point[axis] == every[axis]
    assert point.but(**{axis: None})[axis] is None
    assert next(item for item in declared if item.name == axis).what


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, rows in TABLE.items() for name in rows])
def test_a_part_says_where_it_may_be_used_and_what_is_offered(table: str, name: str) -> None:
    part = TABLE[table][name]
    assert part.places
    assert set(part.places) <= {*PLACES, parts.REWRITES, parts.MEASURE}
    assert set(part.offers) <= set(part.places)
    for where in part.offers.values():
        for spelling in where:
            parts.read("grain" if table == "grid" else table, spelling)
    for other, refused in {**part.wants, **part.refuses}.items():
        assert set(refused) <= set(TABLE[other])


@pytest.mark.parametrize("table", ["rounder", "compensator", "rewrite"])
def test_whether_a_part_reads_text_is_what_its_line_says(table: str) -> None:
    for name, part in TABLE[table].items():
        needs = [key for key, option in parts.options(table, name).items() if option.default is inspect.Parameter.empty]
        made = parts.build(table, parts.read(table, f"{name}:8" if needs else name))
        assert bool(made.needs) == part.text, name
