"""Selectors: which places a rule speaks of.

`blocks.*.attn.q` is a glob over canonical names (`*` crosses dots, `{q,k}` is a choice, `[0-3]` a class); `kind:down`
matches kinds; `a | b` is either. Embeddings, heads, routers, tables of positions or types, and the taps that no matrix
reads (queries, keys, values, probabilities, residual) are never taken by a wildcard: they are matched only by a pattern
that ends in their own last word (`embed`, `blocks.*.moe.router`) or by their kind. Taps are matched by their names
(`blocks.*.mlp.hidden`), or through the sites that read them (`read-by:blocks.*.down`); stores, streams, blocks and
residuals by theirs (`blocks.3.cache`, `blocks.*.ffn`, `blocks.3`, `blocks.2.residual`). `first:2` and `last:2` are what
wildcards take in so many blocks at an end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from regauge.anatomy.inner import inner_taps, word_of
from regauge.errors import RecipeError

if TYPE_CHECKING:
    from regauge.anatomy.model import Anatomy, Site

SPECIAL = frozenset({"embed", "head", "router", "position", "type", "patch"})
"""Kinds that stay in full precision unless a rule names them."""
READ_BY = "read-by:"
"""Before a selector of sites: the taps that they read."""
AT_END = re.compile(r"(first|last):(\d{1,5})")
"""Everything in the first or last blocks."""


@dataclass(frozen=True)
class Spot:
    """One place of an anatomy that a rule can speak of.

    Attributes:
        name: canonical.
        kind: what `kind:` matches.
        tail: the last words that a pattern must end in, where no wildcard takes it; "" where one does.
        sites: those that read it, of a tap; the site itself.
        ends: how many blocks come before its own, and how many after; None outside of blocks.
    """

    name: str
    kind: str
    tail: str = ""
    sites: tuple[Site, ...] = ()
    ends: tuple[int, int] | None = None


def spots(anatomy: Anatomy, place: str) -> tuple[Spot, ...]:
    """Everything that rules of one place can speak of."""
    return tuple(_placed(spot, anatomy.blocks) for spot in _SPOTS[place](anatomy))


def _placed(spot: Spot, blocks: int) -> Spot:
    found = re.match(r"blocks\.(\d+)(?=\.|$)", spot.name)
    return spot if found is None else replace(spot, ends=(int(found[1]), blocks - 1 - int(found[1])))


def _sites(anatomy: Anatomy) -> tuple[Spot, ...]:
    return tuple(_spot(site) for site in anatomy.sites)


def _spot(site: Site) -> Spot:
    tail = site.name.rpartition(".")[2] if site.kind in SPECIAL else ""
    return Spot(site.name, site.kind, tail, (site,))


def _taps(anatomy: Anatomy) -> tuple[Spot, ...]:
    readers: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        if site.tap is not None:
            readers.setdefault(site.tap, []).append(site)
    found = []
    for name, sites in readers.items():
        words = name.split(".")
        tail = ".".join(words[-2:]) if all(site.kind in SPECIAL for site in sites) else ""
        found.append(Spot(name, words[-1], tail, tuple(sites)))
    return (*found, *(Spot(name, word_of(name), word_of(name)) for name in inner_taps(anatomy)))


def _stores(anatomy: Anatomy) -> tuple[Spot, ...]:
    keeps = anatomy.causal or anatomy.plumbing.scales
    kept = {site.block for site in anatomy.sites if site.kind == "k"} if keeps else set()
    return tuple(Spot(f"blocks.{block}.cache", "cache") for block in range(anatomy.blocks) if block in kept)


def _attentions(anatomy: Anatomy) -> tuple[Spot, ...]:
    found = [f"blocks.{block}" for block in range(anatomy.blocks) if anatomy.attention(block) is not None]
    return tuple(Spot(f"{block}.attention", "attention") for block in found) if anatomy.causal else ()


def _shapes(anatomy: Anatomy) -> tuple[Spot, ...]:
    blocks = [Spot(f"blocks.{block}", "block") for block in range(anatomy.blocks)]
    streams = [
        Spot(stream.name, stream.kind, "residual" if stream.kind == "residual" else "")
        for stream in anatomy.streams
        if "select" in stream.admits
    ]
    return (*blocks, *streams)


def _residuals(anatomy: Anatomy) -> tuple[Spot, ...]:
    return tuple(Spot(f"blocks.{block}.residual", "residual") for block in range(anatomy.blocks - 1))


_SPOTS = {
    "weights": _sites,
    "inputs": _taps,
    "cache": _stores,
    "attention": _attentions,
    "shape": _shapes,
    "tokens": _residuals,
}


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
    """Whether a rule of weights with this selector speaks of the site."""
    return taken(selector, _spot(site))


def taken(selector: str, spot: Spot) -> bool:
    """Whether a rule with this selector speaks of a place."""
    return any(_taken(pattern, spot) for pattern in alternatives(selector))


def named(selector: str, spot: Spot) -> tuple[Site, ...]:
    """The sites through which a selector speaks of a tap: all that read it, where it names the tap itself."""
    found: dict[str, Site] = {}
    for pattern in alternatives(selector):
        if _taken(pattern, spot):
            inner = pattern.removeprefix(READ_BY)
            found |= {s.name: s for s in spot.sites if inner == pattern or _taken(inner, _spot(s))}
    return tuple(found.values())


def _taken(pattern: str, spot: Spot) -> bool:
    if pattern.startswith(READ_BY):
        inner = pattern.removeprefix(READ_BY)
        return any(_taken(inner, _spot(site)) for site in spot.sites)
    if pattern.startswith("kind:"):
        kind = pattern.removeprefix("kind:")
        return bool(_glob(kind).fullmatch(spot.kind)) and (not spot.tail or kind == spot.kind)
    if end := AT_END.fullmatch(pattern):
        return spot.ends is not None and not spot.tail and spot.ends[end[1] == "last"] < int(end[2])
    if not _glob(pattern).fullmatch(spot.name):
        return False
    words = spot.tail.count(".") + 1
    return not spot.tail or ".".join(pattern.split(".")[-words:]) == ".".join(spot.name.split(".")[-words:])


def pattern(name: str) -> str:
    """The selector of a site and its like in other blocks and experts: `blocks.3.moe.5.up` → `blocks.*.moe.*.up`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
