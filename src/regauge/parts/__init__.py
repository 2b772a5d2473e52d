"""Parts by name.

A part is named in a recipe by one word (`gptq`), by a word with its main option (`group:128`), with a fallback
(`group:128 else channel`), or by a mapping with options (`{part: gptq, damp: 0.05}`). Parts of others are named
`package.module:Name`.
"""

from regauge.parts.build import (
    OTHERWISE,
    build,
    bytes_of,
    check,
    compensator_of,
    describe,
    format_of,
    load,
    options,
    read,
    rounder_of,
    spell,
)
from regauge.parts.spec import Choice, Option, Spec
from regauge.parts.table import AXES, Part, foreign, part

__all__ = [
    "AXES",
    "OTHERWISE",
    "Choice",
    "Option",
    "Part",
    "Spec",
    "build",
    "bytes_of",
    "check",
    "compensator_of",
    "describe",
    "foreign",
    "format_of",
    "load",
    "options",
    "part",
    "read",
    "rounder_of",
    "spell",
]
