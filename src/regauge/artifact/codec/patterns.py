"""Regular expressions that somebody else wrote, matched in bounded time.

Python's engine tries every way to share a text out among repetitions, so a pattern from a file could keep it busy for
ever. Names of modules are short and patterns for them simple: repetitions of single characters, a few of them, and
groups that are not repeated. Everything else is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache

from regauge.errors import ArtifactError

LONG = 500  # characters of a pattern
REPEATS = 4  # repetitions in one pattern: a name of n characters is shared out among them in some n⁴ / 24 ways
NAME = 200  # characters of a module's path
TOKEN = re.compile(
    r"""
    (?P<escape> \\ [^0-9AZbB] )              # an escaped character or a class; not a reference to a group
    | (?P<edge> \\ [AZbB] | [\^$|] )         # an end, or a choice
    | (?P<set> \[ \^? \]? (?: [^\]\\] | \\. )* \] )
    | (?P<open> \( (?: \? [:=!] )? (?!\?) )   # a group, or a look ahead
    | (?P<close> \) )
    | (?P<times> [*+?] \??  | \{ \d{0,3} (?: ,\d{0,3} )? \} )
    | (?P<plain> [^\\()\[\]{}*+?|^$] )
    """,
    re.VERBOSE | re.DOTALL,
)

SETS = re.compile(r"^\[\^?\[ | -- | && | ~~ | \|\|", re.VERBOSE)
"""What Python's engine warns of in a set: nested ones, and sets made of two."""


@lru_cache(maxsize=4096)
def pattern(text: str) -> re.Pattern[str]:
    """A compiled pattern.

    Raises:
        ArtifactError: it is none, or one that could take long.
    """
    try:
        if len(text) > LONG:
            raise ValueError(f"it has {len(text)} characters, and {LONG} are read")
        _check(text)
        return re.compile(text)
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise ArtifactError(
            f"quantization_config names modules by {text[:80]!r}, which is no pattern that is taken: {error}."
        ) from error


def matches(text: str, name: str) -> bool:
    """Whether the pattern matches the beginning of a module's path."""
    return pattern(text).match(name[:NAME]) is not None


def _check(text: str) -> None:
    """
    Raises:
        ValueError: says what it holds that is not taken.
    """
    at, repeats, before = 0, 0, ""
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"{text[at : at + 10]!r} is not read in a pattern of a file")
        kind = str(found.lastgroup)
        if kind == "set" and SETS.search(found[0]):
            raise ValueError(f"{found[0][:20]!r} is a set that later versions of Python may read otherwise")
        if kind == "times":
            if before not in ("escape", "set", "plain"):
                raise ValueError("it repeats more than a single character")
            repeats += found[0] not in ("?", "??")
        before, at = kind, found.end()
    if repeats > REPEATS:
        raise ValueError(f"it repeats {repeats} times, and at most {REPEATS} are taken")
