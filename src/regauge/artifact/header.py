"""The header of a regauge artifact: what each place is and what the anatomy became, as JSON in config.json.

Version 2 lists points by place (`weights`, `inputs`, `cache`, `shape`, `tokens`), the kinds of terms that matrices are
sums of, and the sizes of sites that are not those of the config. Version 1 (sites with their activations beside them)
still reads. Everything here comes from a directory that others may have written: each key, type and name is checked
before it is used, and none may name code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from regauge import parts
from regauge.anatomy.inner import inner_taps
from regauge.anatomy.model import Anatomy
from regauge.artifact.changes import changed, changes
from regauge.artifact.codec.base import DECODES, REGAUGE, Layout
from regauge.artifact.codec.taps import by_tap
from regauge.artifact.strict import known, listed, mapped, named, typed
from regauge.errors import ArtifactError, RecipeError, nearest
from regauge.formats.terms import KINDS
from regauge.parts import ATTENTION, AXES, CACHE, FORMAT, INPUTS, PLACES, TOKENS, WEIGHTS, Option, Point, Spec, axis_of
from regauge.plan import forms
from regauge.plan.select import spots
from regauge.plan.stores import stores

FORMAT_VERSION = 2
AT = "at"
"""The key that lists the names which share a point."""
HELD = (WEIGHTS, INPUTS, CACHE, ATTENTION, TOKENS)
"""Places whose points are needed to run a model; what pruning did stands in the sizes."""
KEYS = ("quant_method", "format_version", "anatomy", "terms", "sizes", *PLACES)
OLD_KEYS = ("quant_method", "format_version", "anatomy", "choices")
OLD_INPUTS = "activations"
"""How version 1 called the grid of a site's input, beside the site's own coordinates."""


def header(layout: Layout) -> dict[str, object]:
    """`quantization_config` of config.json. Parts of other packages are left out where decoding does not ask for them;
    `decoder` refuses the others."""
    assert not layout.apart, "a site that reads its tap otherwise than the tap is read is of format version 1"
    terms: dict[str, list[str]] = {}
    for name, point in layout.quantised.items():
        compensator = point.name("compensator")
        if compensator and parts.part("compensator", compensator).term:
            terms.setdefault(parts.part("compensator", compensator).term, []).append(name)
    source = {site.name: site.shape for site in layout.source.sites}
    sizes = {site.name: list(site.shape) for site in layout.anatomy.sites if site.shape != source.get(site.name)}
    return {
        "quant_method": REGAUGE,
        "format_version": FORMAT_VERSION,
        WEIGHTS: grouped({name: _own(point) for name, point in layout.quantised.items()}),
        INPUTS: grouped(layout.inputs),
        **({CACHE: grouped(layout.cache)} if layout.cache else {}),
        **({ATTENTION: grouped(layout.attention)} if layout.attention else {}),
        **({TOKENS: grouped(layout.tokens)} if layout.tokens else {}),
        "terms": terms,
        "sizes": sizes,
        "anatomy": changes(layout.source, layout.anatomy),
    }


def read_header(raw: Mapping[str, Any], source: Anatomy, dtype: torch.dtype) -> Layout:
    """The layout again, from the header and the anatomy that the config describes.

    Raises:
        ArtifactError: a newer format version, a key, type, name or part that is none, a part of another package, or a
            header that contradicts the anatomy; in a sentence.
    """
    version = raw.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"the artifact has format version {version} and this regauge reads 1 to {FORMAT_VERSION}; "
            "upgrade it: pip install -U regauge."
        )
    return _first(raw, source, dtype) if version == 1 else _second(raw, source, dtype)


def _second(raw: Mapping[str, Any], source: Anatomy, dtype: torch.dtype) -> Layout:
    known(raw, KEYS, "the header")
    anatomy = changed(source, mapped(raw, "anatomy", "the header"), mapped(raw, "sizes", "the header"))
    points = {place: read_points(raw, place) for place in PLACES if place in raw}
    for place in points:
        if points[place] and place not in HELD:
            raise ArtifactError(
                f"the header has {place} of {_first_of(points[place])!r}, and nothing acts on them yet."
            )
    choices, inputs = points.get(WEIGHTS, {}), points.get(INPUTS, {})
    _there(choices, {site.name for site in anatomy.sites}, source)
    _there(inputs, {site.tap for site in anatomy.sites if site.tap is not None} | inner_taps(anatomy).keys(), source)
    _terms(mapped(raw, "terms", "the header"), choices)
    tokens = points.get(TOKENS, {})
    if tokens and not anatomy.plumbing.scales:
        raise ArtifactError(f"the header has tokens of {_first_of(tokens)!r}, and nothing acts on them yet.")
    _there(tokens, {spot.name for spot in spots(anatomy, TOKENS)}, source)
    kept = fitting(points.get(CACHE, {}), anatomy)
    found = Layout(source, anatomy, dict(choices), dtype, inputs=inputs, cache=kept, tokens=tokens)
    return attending(found, points.get(ATTENTION, {}))


def attending(layout: Layout, points: Mapping[str, Point]) -> Layout:
    """The layout with blocks that attend as the points say.

    Raises:
        ArtifactError: a block is none of the model's, or they are not settled or do not fit it.
    """
    _there(points, {spot.name for spot in spots(layout.anatomy, ATTENTION)}, layout.anatomy)
    try:
        forms.of_points(points, layout.anatomy)
    except (RecipeError, ValueError) as error:
        raise ArtifactError(f"the header in config.json cannot be kept to: {error}.") from error
    coded = [name for name in layout.quantised if name in replace(layout, attention=points).gone]
    if coded:
        raise ArtifactError(f"the header lists codes of {coded[0]!r}, whose block takes another's attention map.")
    return replace(layout, attention=points)


def _first(raw: Mapping[str, Any], source: Anatomy, dtype: torch.dtype) -> Layout:
    """Format version 1."""
    known(raw, OLD_KEYS, "the header")
    anatomy = changed(source, mapped(raw, "anatomy", "the header"), {})
    choices: dict[str, Point | None] = {}
    readings: dict[str, Point | None] = {}
    for group in listed(raw, "choices", "the header"):
        rest = {key: value for key, value in group.items() if key not in ("sites", OLD_INPUTS)}
        sites = named(group, "sites", "a choice of the header")
        choices |= dict.fromkeys(sites, _point(WEIGHTS, rest))
        if OLD_INPUTS in group:
            grid = _spec(INPUTS, "grid", group[OLD_INPUTS])
            readings |= dict.fromkeys(sites, parts.point(INPUTS, grid=grid.part))
    _there(choices, {site.name for site in anatomy.sites}, source)
    inputs, apart = by_tap(anatomy, readings)
    return Layout(source, anatomy, choices, dtype, inputs=inputs, apart=apart)


def _own(point: Point) -> Point:
    """A point without the parts of other packages that only say how its codes came about."""
    foreign = {axis: None for axis, spec in point if axis not in DECODES and parts.foreign(spec.part)}
    return point.but(**foreign)


def grouped(points: Mapping[str, Point]) -> list[dict[str, object]]:
    """Points as a header lists them: a mapping each, with the names that share it."""
    groups: dict[Point, list[str]] = {}
    for name, point in points.items():
        groups.setdefault(point, []).append(name)
    return [
        {AT: names, **{axis: {"part": spec.part, **dict(spec.options)} for axis, spec in point}}
        for point, names in groups.items()
    ]


def read_points(raw: Mapping[str, Any], place: str) -> dict[str, Point]:
    """Name → point of one place, of the groups that a header lists.

    Raises:
        ArtifactError: a key, type, part or name is none, in a sentence.
    """
    found: dict[str, Point] = {}
    for group in listed(raw, place, "the header"):
        names = named(group, AT, f"a group of {place} in the header")
        twice = [name for name in names if name in found]
        if twice:
            raise ArtifactError(f"the header lists {twice[0]!r} twice among its {place}.")
        found |= dict.fromkeys(names, _point(place, {key: value for key, value in group.items() if key != AT}))
    return found


def _point(place: str, raw: Mapping[str, Any]) -> Point:
    known(raw, AXES[place], f"a group of {place} in the header")
    point = Point.of(place, {axis: _spec(place, axis, value) for axis, value in raw.items()})
    needed = DECODES if place == WEIGHTS else ("grid",) if place == INPUTS else ()
    lacking = [axis for axis in needed if axis not in raw]
    if lacking:
        raise ArtifactError(f"the header in config.json cannot be read: a group of {place} lacks its {lacking[0]}.")
    return point


def _spec(place: str, axis: str, raw: object) -> Spec:
    where = f"{axis} of {place} in the header"
    fields = typed(raw, dict, where)
    name = typed(fields.get("part"), str, f"the part of {where}")
    options = {key: _option(value, f"{key} of {where}") for key, value in fields.items() if key != "part"}
    words = [name, *(value for value in options.values() if isinstance(value, str))]
    for word in (piece for text in words for alternative in text.split(" else ") for piece in alternative.split("/")):
        if parts.foreign(word) or word.count(":") > 1:
            raise ArtifactError(
                f"a matrix is stored with the {axis} {word!r} of another package, which an artifact cannot make "
                "regauge import; load it where you trust it, through that package."
            )
    spec, table = Spec(name, tuple(sorted(options.items()))), axis_of(place, axis).parts
    if parts.numeric(axis_of(place, axis), spec):
        return spec
    try:
        if table == FORMAT or not parts.empty(table, place):
            if table != FORMAT:
                parts.part(table, name, place)
            parts.check(table, spec, place)
            parts.build(table, spec)
    except RecipeError as error:
        raise ArtifactError(f"the header in config.json cannot be read: {error}.") from error
    return spec


def _option(value: object, where: str) -> Option:
    if isinstance(value, str | int | float | bool):
        return value
    raise ArtifactError(f"the header in config.json cannot be read: {where} is {value!r}, which is no option.")


def _there(points: Mapping[str, object], names: set[str], source: Anatomy) -> None:
    strange = [name for name in points if name not in names]
    if strange:
        raise ArtifactError(f"the header names {strange[0]!r}, which a {source.family} model of this config has not.")


def fitting(points: dict[str, Point], anatomy: Anatomy) -> dict[str, Point]:
    """The points of stores, where heads of these sizes can hold them.

    Raises:
        ArtifactError: a store is none of the model's, a part does not act yet, or the sizes do not fit.
    """
    _there(points, {spot.name for spot in spots(anatomy, CACHE)}, anatomy)
    for point in points.values():
        for name, spec in point:
            axis = axis_of(CACHE, name)
            if parts.empty(axis.parts, CACHE) and not parts.numeric(axis, spec):
                raise ArtifactError(
                    f"the header has {spec.part[:40]!r} as the {name} of a cache, and no part acts there."
                )
    found = stores(anatomy, points)
    if found.reasons:
        raise ArtifactError(f"the header in config.json cannot be kept to: {next(iter(found.reasons))}.")
    return found.points


def _first_of(points: Mapping[str, object]) -> str:
    return next(iter(points))


def _terms(raw: Mapping[str, Any], choices: Mapping[str, object]) -> None:
    """Terms of kinds that this regauge can apply, of sites that are quantised."""
    for kind, sites in raw.items():
        if kind not in KINDS:
            raise ArtifactError(
                f"the artifact adds terms of kind {kind!r}, which this regauge cannot apply{nearest(kind, KINDS)}; "
                "upgrade it: pip install -U regauge."
            )
        for name in typed(sites, list, f"terms of kind {kind} in the header"):
            if typed(name, str, f"a site with terms of kind {kind} in the header") not in choices:
                raise ArtifactError(f"the header adds a term to {name!r}, which has no codes.")
