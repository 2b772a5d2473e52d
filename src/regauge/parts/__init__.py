"""Places, axes and parts by name.

What a recipe can speak of is declared in `points`; which parts there are stands in `table`. A part is named in a recipe
by one word (`gptq`), by a word with its main option (`group:128`), with a fallback (`group:128 else channel`), or by a
mapping with options (`{part: gptq, damp: 0.05}`). Parts of others are named `package.module:Name`.
"""

from regauge.parts.build import (
    OTHERWISE,
    build,
    bytes_of,
    check,
    compensator_of,
    describe,
    format_of,
    halves,
    load,
    maker_of,
    options,
    point,
    read,
    rounder_of,
    spell,
)
from regauge.parts.lookup import empty, foreign, part
from regauge.parts.part import Part
from regauge.parts.points import (
    ATTENTION,
    AXES,
    CACHE,
    FORMAT,
    FORMATS,
    INPUTS,
    PLACES,
    REWRITES,
    SHAPE,
    WEIGHTS,
    WORD,
    Axis,
    Place,
    Point,
    axis_of,
    numeric,
    place_of,
    tables,
)
from regauge.parts.spec import Option, Spec
from regauge.parts.table import TABLE

__all__ = [
    "ATTENTION",
    "AXES",
    "CACHE",
    "FORMAT",
    "FORMATS",
    "INPUTS",
    "OTHERWISE",
    "PLACES",
    "REWRITES",
    "SHAPE",
    "TABLE",
    "WEIGHTS",
    "WORD",
    "Axis",
    "Option",
    "Part",
    "Place",
    "Point",
    "Spec",
    "axis_of",
    "build",
    "bytes_of",
    "check",
    "compensator_of",
    "describe",
    "empty",
    "foreign",
    "format_of",
    "halves",
    "load",
    "maker_of",
    "numeric",
    "options",
    "part",
    "place_of",
    "point",
    "read",
    "rounder_of",
    "spell",
    "tables",
]
