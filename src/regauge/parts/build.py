"""From a spelling to a spec, and from a spec to the part. A part's module is imported when it is built, not before."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from regauge.errors import RecipeError, nearest
from regauge.parts.spec import Choice, Option, Spec
from regauge.parts.table import foreign, part

if TYPE_CHECKING:
    from regauge.formats.base import Format
    from regauge.rounding.base import Compensator, Rounder

OTHERWISE = "otherwise"
"""The option that holds a grain's fallback, spelled `… else channel`."""


def read(axis: str, text: str) -> Spec:
    """`gptq`, `group:128`, `group:128 else channel`, `package.module:Name` → Spec."""
    first, *rest = text.split(" else ", 1)
    first = first.strip()
    options: dict[str, Option] = {}
    name, colon, value = first.partition(":")
    if colon and not foreign(first):
        short = part(axis, name).short
        if not short:
            raise RecipeError(f"{axis} {name!r} has no main option: write {name!r} or {{part: {name}, …}}")
        options[short] = _scalar(value)
    else:
        name = first
        part(axis, name)
    if rest:
        if axis != "grain":
            raise RecipeError(f"only a grain can fall back: {axis} {text!r} has an 'else'")
        options[OTHERWISE] = spell(axis, read(axis, rest[0]))
    return Spec(name, tuple(sorted(options.items())))


def spell(axis: str, spec: Spec) -> str:
    """The one-line spelling, or "" where the options need a mapping."""
    options = dict(spec.options)
    otherwise = options.pop(OTHERWISE, None)
    text = spec.part
    if options:
        if foreign(spec.part) or list(options) != [part(axis, spec.part).short]:
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


def load(axis: str, name: str) -> Callable[..., Any]:
    """The constructor itself; imports its module."""
    module, _, attribute = part(axis, name).path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]  # by name
    except ImportError as error:
        raise RecipeError(f"{axis} {name!r} cannot be imported: {error}") from error
    except AttributeError as error:
        raise RecipeError(f"{axis} {name!r}: module {module!r} has no {attribute!r}") from error


def options(axis: str, name: str) -> dict[str, inspect.Parameter]:
    """What a recipe may set on a part: name → parameter with its default."""
    fixed = part(axis, name).fixed
    found = inspect.signature(load(axis, name)).parameters
    return {key: value for key, value in found.items() if key not in fixed}


_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def check(axis: str, spec: Spec) -> None:
    """Raise a RecipeError where an option is unknown, missing or of the wrong kind."""
    known = options(axis, spec.part)
    given = {key: value for key, value in spec.options if key != OTHERWISE}
    for key, value in given.items():
        if key not in known:
            hint = nearest(key, known) if known else " (it has none)"
            raise RecipeError(f"{axis} {spec.part!r} has no option {key!r}{hint}")
        kinds = tuple(kind for word in str(known[key].annotation).split("|") for kind in _KINDS.get(word.strip(), ()))
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise RecipeError(f"option {key!r} of {axis} {spec.part!r} takes {known[key].annotation}, not {value!r}")
    missing = [key for key, value in known.items() if value.default is inspect.Parameter.empty and key not in given]
    if missing:
        short = part(axis, spec.part).short
        how = f"{spec.part}:VALUE" if missing == [short] else f"{{part: {spec.part}, {missing[0]}: …}}"
        raise RecipeError(f"{axis} {spec.part!r} needs {', '.join(missing)}: write {how}")


@lru_cache(maxsize=1024)
def build(axis: str, spec: Spec) -> Any:
    """The part itself. Equal specs give the same object."""
    check(axis, spec)
    given = dict(spec.options)
    otherwise = given.pop(OTHERWISE, None)
    try:
        made = load(axis, spec.part)(**part(axis, spec.part).fixed, **given)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{axis} {spec.part!r}: {error}") from error
    if otherwise is None:
        return made
    from regauge.formats.grains import Fallback

    return Fallback(made, build(axis, read(axis, str(otherwise))))


def format_of(choice: Choice) -> Format:
    """The weight format of a site's coordinates."""
    from regauge.formats.base import Format

    return Format(
        grid=build("grid", choice.grid),
        grain=build("grain", choice.grain),
        ranger=build("ranger", choice.ranger),
        scale=build("scale", choice.scale),
    )


def rounder_of(choice: Choice) -> Rounder:
    """The rounder of a site's coordinates."""
    made: Rounder = build("rounder", choice.rounder)
    return made


def compensator_of(choice: Choice) -> Compensator | None:
    """The compensator of a site's coordinates, if it has one."""
    made: Compensator | None = None if choice.compensator is None else build("compensator", choice.compensator)
    return made


def bytes_of(choice: Choice, shape: tuple[int, int]) -> int:
    """Bytes stored for a matrix of this shape: codes, steps, zero points, and what a compensator adds."""
    compensator = compensator_of(choice)
    return format_of(choice).bytes(shape) + (0 if compensator is None else compensator.bytes(shape))


def describe(axis: str, name: str) -> str:
    """The one-line description."""
    return part(axis, name).what
