"""Selectors: which sites a rule speaks of.

`blocks.*.attn.q` is a glob over canonical names (`*` crosses dots, `{q,k}` is a choice, `[0-3]` a class); `kind:down`
matches kinds; `a | b` is either. Embeddings, heads, routers and tables of positions or types are never taken by a
wildcard: they are matched only by a pattern that ends in their own last word (`embed`, `blocks.*.moe.router`) or by
their kind.
"""

from __future__ import annotations

import re
from functools import lru_cache

from regauge.anatomy.model import Site
from regauge.errors import RecipeError

SPECIAL = frozenset({"embed", "head", "router", "position", "type", "patch"})
"""Kinds that stay in full precision unless a rule names them."""


def _braces(pattern: str) -> list[str]:
    """`a.{q,k}` → `a.q`, `a.k`. One level; several braces multiply."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        if "{" in pattern or "}" in pattern:
            raise RecipeError(f"selector {pattern!r} has a brace without its partner")
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [done for word in found[1].split(",") for done in _braces(head + word.strip() + tail)]


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> re.Pattern[str]:
    out = ""
    for token in re.findall(r"\[[^\]]+\]|.", pattern):
        out += ".*" if token == "*" else "." if token == "?" else token if len(token) > 1 else re.escape(token)
    return re.compile(out)


@lru_cache(maxsize=4096)
def alternatives(selector: str) -> tuple[str, ...]:
    """The plain patterns of a selector."""
    found = tuple(done for part in selector.split("|") for done in _braces(part.strip()))
    if not all(found):
        raise RecipeError(f"selector {selector!r} has an empty alternative")
    return found


def matches(selector: str, site: Site) -> bool:
    """Whether a rule with this selector speaks of the site."""
    for pattern in alternatives(selector):
        if pattern.startswith("kind:"):
            named = pattern.removeprefix("kind:")
            if _glob(named).fullmatch(site.kind) and (site.kind not in SPECIAL or named == site.kind):
                return True
        elif _glob(pattern).fullmatch(site.name) and (
            site.kind not in SPECIAL or pattern.rpartition(".")[2] == site.name.rpartition(".")[2]
        ):
            return True
    return False


def pattern(name: str) -> str:
    """The selector of a site and its like in other blocks and experts: `blocks.3.moe.5.up` → `blocks.*.moe.*.up`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
