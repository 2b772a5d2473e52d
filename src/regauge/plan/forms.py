"""What a rule of `attention` comes to at each block, and why it cannot be had there, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from regauge import parts
from regauge.anatomy.model import Anatomy
from regauge.attention.base import Local, Seen
from regauge.errors import RecipeError
from regauge.parts import ATTENTION, Point, Spec, axis_of
from regauge.plan.stores import block_of

WINDOW, SHARE = "window", "share"


@dataclass(frozen=True)
class Forms:
    """How the blocks of a model attend, settled.

    Attributes:
        shared: block → the earlier block whose probabilities it takes.
        windows: block → which of its heads see how little.
    """

    shared: Mapping[int, int] = field(default_factory=dict)
    windows: Mapping[int, Local] = field(default_factory=dict)

    @property
    def leaders(self) -> dict[int, int]:
        """Block whose probabilities others take → how many do."""
        found: dict[int, int] = {}
        for leader in self.shared.values():
            found[leader] = found.get(leader, 0) + 1
        return found

    def points(self) -> dict[str, Point]:
        """As an artifact holds them."""
        found: dict[int, dict[str, Spec]] = {}
        for block, leader in self.shared.items():
            found.setdefault(block, {})[SHARE] = Spec("of", (("block", leader),))
        for block, local in self.windows.items():
            options = (("heads", local.heads), ("sinks", local.sinks), ("tokens", local.tokens))
            found.setdefault(block, {})[WINDOW] = Spec("local", options)
        return {f"blocks.{block}.attention": Point.of(ATTENTION, dict(found[block])) for block in sorted(found)}


def part_of(point: Point, axis: str) -> object:
    """The part on an axis; a bare number is a window of all heads."""
    spec = point.spec(axis)
    if parts.numeric(axis_of(ATTENTION, axis), spec):
        return Local(tokens=int(spec.part))
    return parts.build(axis, spec)


def needs_of(points: Mapping[str, Point]) -> frozenset[str]:
    """What must be read off the original model before they are settled."""
    found = frozenset[str]()
    for point in points.values():
        for axis, _ in point:
            found |= part_of(point, axis).needs  # type: ignore[attr-defined]  # every part of these tables has it
    return found


def settle(points: Mapping[str, Point], anatomy: Anatomy, seen: Seen) -> Forms:
    """The forms that the points come to.

    Raises:
        RecipeError: they cannot be had of this model.
    """
    shared: dict[int, int] = {}
    windows: dict[int, Local] = {}
    for spec, blocks in _alike(points, SHARE).items():
        shared |= part_of(Point.of(ATTENTION, {SHARE: spec}), SHARE)(blocks, anatomy.blocks, seen)  # type: ignore[operator]  # a share
    for spec, blocks in _alike(points, WINDOW).items():
        windows |= part_of(Point.of(ATTENTION, {WINDOW: spec}), WINDOW)(blocks, seen)  # type: ignore[operator]  # a window
    windows = {block: local for block, local in windows.items() if block not in shared}
    found = Forms(shared, windows)
    if reasons := list(dict.fromkeys(_wrong(found, anatomy))):
        raise RecipeError("; ".join(reasons))
    return found


def of_points(points: Mapping[str, Point], anatomy: Anatomy) -> Forms:
    """The forms of settled points, as a header holds them.

    Raises:
        RecipeError: they are not settled, or do not fit the model.
    """
    if needs_of(points):
        raise RecipeError("how its blocks attend is not settled")
    return settle(points, anatomy, Seen(kv_heads=kv_heads(anatomy)))


def kv_heads(anatomy: Anatomy) -> dict[int, int]:
    """Block → its KV heads."""
    held = {block: anatomy.attention(block) for block in range(anatomy.blocks)}
    return {block: sizes.kv_heads for block, sizes in held.items() if sizes is not None}


def refusals(points: Mapping[str, Point], stores: Mapping[str, Point], anatomy: Anatomy) -> Iterator[tuple[str, str]]:
    """(why, block) of what no text could settle; `stores` is what the same plan says of caches."""
    if stores and any(point[SHARE] is not None for point in points.values()):
        yield (
            "a block that takes another's attention map keeps values and no keys, which no store of a cache's recipe "
            "does: leave 'share' or 'cache' out",
            next(iter(stores)),
        )
    if (why := _ungrouped(points, anatomy)) and not any(_unshared(block_of(name), anatomy) for name in points):
        yield why, next(iter(points))
    for name, point in points.items():
        block = block_of(name)
        spec = point[WINDOW]
        number = spec is not None and parts.numeric(axis_of(ATTENTION, WINDOW), spec)
        if spec is not None and number and (not spec.part.isdecimal() or not int(spec.part)):
            yield f"a window counts the last tokens, 1 or more of them, and {spec.part} is no such number", name
        if point[SHARE] is not None and (why := _unshared(block, anatomy)):
            yield why, name


def _ungrouped(points: Mapping[str, Point], anatomy: Anatomy) -> str:
    """Why a text, whatever it shows, would settle no groups; "" where it would."""
    pairs = {(block, before): 0.0 for block in range(anatomy.blocks) for before in range(block)}
    for spec, blocks in _alike(points, SHARE).items():
        try:
            part_of(Point.of(ATTENTION, {SHARE: spec}), SHARE)(blocks, anatomy.blocks, Seen(pairs))  # type: ignore[operator]  # a share
        except RecipeError as error:
            return str(error)
    return ""


def _alike(points: Mapping[str, Point], axis: str) -> dict[Spec, list[int]]:
    """Spec of an axis → its blocks, which are settled together."""
    found: dict[Spec, list[int]] = {}
    for name, point in points.items():
        if point[axis] is not None:
            found.setdefault(point.spec(axis), []).append(block_of(name))
    return found


def _unshared(block: int, anatomy: Anatomy) -> str:
    """Why a block can be in no group, whatever its map; "" where it can."""
    sites = {site.kind: site.module for site in anatomy.in_block(block) if site.kind in ("q", "k", "v", "o")}
    if len(set(sites.values())) < len(sites):
        return "a block that takes another's attention map has no queries and keys, and here they are fused with values"
    if block in anatomy.plumbing.sliding:
        return "a block whose attention slides over a window shares no map: leave it out of the rule"
    return ""


def _wrong(forms: Forms, anatomy: Anatomy) -> Iterator[str]:
    sizes = {block: anatomy.attention(block) for block in range(anatomy.blocks)}
    for block, leader in forms.shared.items():
        one, two = sizes.get(block), sizes.get(leader)
        if leader in forms.shared:
            yield f"block {block} takes the map of block {leader}, which has none of its own"
        if one is None or two is None or one.heads != two.heads:
            yield f"blocks {leader} and {block} have other numbers of heads, so neither takes the other's map"
        for which in (block, leader):
            if why := _unshared(which, anatomy):
                yield why
    for block, local in forms.windows.items():
        own = sizes.get(block)
        try:
            local.numbers(0 if own is None else own.kv_heads)
        except ValueError as error:
            yield f"block {block}: {error}"
