"""From a spelling to a spec, and from a spec to the part. A part's module is imported when it is built, not before."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from regauge.errors import RecipeError, nearest
from regauge.parts.lookup import foreign, part
from regauge.parts.points import FORMAT, FORMATS, PLACES, WEIGHTS, WORD, Point, axis_of
from regauge.parts.spec import Option, Spec
from regauge.parts.table import TABLE

if TYPE_CHECKING:
    from regauge.formats.base import Format
    from regauge.formats.transforms import Maker
    from regauge.rounding.base import Compensator, Rounder

OTHERWISE = "otherwise"
"""The option that holds a grain's fallback, spelled `… else channel`."""
BESIDE = tuple(axis for axis in FORMATS if axis.name not in WORD)
"""What a format in one word may be given beside it."""


def read(table: str, text: str, place: str = "") -> Spec:
    """`gptq`, `group:128`, `group:128 else channel`, `int2-asym/time:32`, `package.module:Name` → Spec.

    Args:
        place: where it is to be used; "" for anywhere.
    """
    if table == FORMAT:
        halves(text, place)
        return Spec(text.strip())
    first, *rest = text.split(" else ", 1)
    first = first.strip()
    options: dict[str, Option] = {}
    name, colon, value = first.partition(":")
    if colon and name not in TABLE.get(table, {}) and not foreign(first) and value[:1].isupper():
        raise RecipeError(f"{first!r} names no module: a part of another package is written package.module:Name")
    if colon and not foreign(first):
        short = part(table, name, place).short
        if not short:
            raise RecipeError(f"{table} {name!r} has no main option: write {name!r} or {{part: {name}, …}}")
        options[short] = _scalar(value)
    else:
        name = first
        part(table, name, place)
    if rest:
        if table != "grain":
            raise RecipeError(f"only a grain can fall back: {table} {text!r} has an 'else'")
        options[OTHERWISE] = spell(table, read(table, rest[0], place))
    return Spec(name, tuple(sorted(options.items())))


def halves(text: str, place: str = "") -> tuple[Spec, Spec]:
    """Grid and grain of a format in one word: `int2-asym/time:32`."""
    grid, slash, grain = (piece.strip() for piece in text.partition("/"))
    if not slash or not grid or not grain:
        raise RecipeError(f"a format is a grid and a grain, such as int4-asym/group:32, not {text!r}")
    return read("grid", grid, place), read("grain", grain, place)


def spell(table: str, spec: Spec) -> str:
    """The one-line spelling, or "" where the options need a mapping."""
    options = dict(spec.options)
    otherwise = options.pop(OTHERWISE, None)
    text = spec.part
    if options:
        if table == FORMAT or foreign(spec.part) or list(options) != [part(table, spec.part).short]:
            return ""
        text = f"{spec.part}:{next(iter(options.values()))}"
    return text if otherwise is None else f"{text} else {otherwise}"


def _scalar(text: str) -> Option:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def load(table: str, name: str) -> Callable[..., Any]:
    """The constructor itself; imports its module."""
    module, _, attribute = part(table, name).path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]  # by name
    except ImportError as error:
        raise RecipeError(f"{table} {name!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise RecipeError(f"{table} {name!r}: module {module!r} has no {attribute!r}") from error


def options(table: str, name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set on a part: name → parameter with its default."""
    fixed = part(table, name).fixed
    found = inspect.signature(load(table, name)).parameters
    return {key: value for key, value in found.items() if key not in fixed}


_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def check(table: str, spec: Spec, place: str = "") -> None:
    """Raise a RecipeError where an option is unknown, missing or of the wrong kind."""
    if table == FORMAT:
        _check_format(spec, place)
        return
    known = options(table, spec.part)
    given = {key: value for key, value in spec.options if key != OTHERWISE}
    for key, value in given.items():
        if key not in known:
            hint = nearest(key, known) if known else " (it has none)"
            raise RecipeError(f"{table} {spec.part!r} has no option {key!r}{hint}")
        kinds = tuple(kind for word in str(known[key].annotation).split("|") for kind in _KINDS.get(word.strip(), ()))
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise RecipeError(f"option {key!r} of {table} {spec.part!r} takes {known[key].annotation}, not {value!r}")
    missing = [key for key, value in known.items() if value.default is inspect.Parameter.empty and key not in given]
    if missing:
        short = part(table, spec.part).short
        how = f"{spec.part}:VALUE" if missing == [short] else f"{{part: {spec.part}, {missing[0]}: …}}"
        raise RecipeError(f"{table} {spec.part!r} needs {', '.join(missing)}: write {how}")


def _check_format(spec: Spec, place: str) -> None:
    for table, half in zip(WORD, halves(spec.part, place), strict=True):
        check(table, half)
    beside = [axis.name for axis in BESIDE]
    for key, value in spec.options:
        if key not in beside:
            raise RecipeError(f"a format has no option {key!r}{nearest(key, beside)}")
        check(key, read(key, str(value), place))


@lru_cache(maxsize=1024)
def build(table: str, spec: Spec) -> Any:
    """The part itself. Equal specs give the same object."""
    check(table, spec)
    given = dict(spec.options)
    if table == FORMAT:
        grid, grain = halves(spec.part)
        return _format(grid, grain, *(read(axis.name, str(given.get(axis.name, axis.default))) for axis in BESIDE))
    otherwise = given.pop(OTHERWISE, None)
    try:
        made = load(table, spec.part)(**part(table, spec.part).fixed, **given)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{table} {spec.part!r}: {error}") from error
    if otherwise is None:
        return made
    from regauge.formats.grains import Fallback

    return Fallback(made, build(table, read(table, str(otherwise))))


def _format(grid: Spec, grain: Spec, ranger: Spec, scale: Spec) -> Format:
    from regauge.formats.base import Format

    return Format(
        grid=build("grid", grid),
        grain=build("grain", grain),
        ranger=build("ranger", ranger),
        scale=build("scale", scale),
    )


def point(place: str, **spellings: str) -> Point:
    """A point by its spellings, defaults filled in: `point("weights", grid="int4", grain="group:32")`."""
    wanted = {axis.name: axis.default for axis in PLACES[place].axes if axis.default} | spellings
    return Point.of(place, {name: read(axis_of(place, name).parts, text, place) for name, text in wanted.items()})


def format_of(point: Point) -> Format:
    """The format of a site's weight or of a tap's activation."""
    return _format(point.spec("grid"), point.spec("grain"), point.spec("ranger"), point.spec("scale"))


def maker_of(point: Point) -> Maker:
    """What makes the transform of a tap."""
    made: Maker = build("transform", point["transform"] or Spec("identity"))
    return made


def rounder_of(point: Point) -> Rounder:
    """The rounder of a site's coordinates."""
    made: Rounder = build("rounder", point.spec("rounder"))
    return made


def compensator_of(point: Point) -> Compensator | None:
    """The compensator of a site's coordinates, if it has one."""
    spec = point["compensator"]
    made: Compensator | None = None if spec is None else build("compensator", spec)
    return made


def bytes_of(point: Point, shape: tuple[int, int]) -> int:
    """Bytes stored for a matrix of this shape: codes, steps, zero points, and what a compensator adds."""
    assert point.place == WEIGHTS, f"bytes are counted of weights, not of {point.place}"
    compensator = compensator_of(point)
    return format_of(point).bytes(shape) + (0 if compensator is None else compensator.bytes(shape))


def describe(table: str, name: str) -> str:
    """The one-line description."""
    return part(table, name).what
