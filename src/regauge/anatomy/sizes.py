"""Sizes of single sites changed: what `select` leaves behind, and what an artifact says of a pruned model.

A site's shape decides where its tensor lies: in a fused parameter the rows of one site begin where those of the one
before it end, interleaved heads are counted, and all experts of a stack have one shape. `resized` gives an anatomy
other shapes and lays its storage out anew; `parameter_shapes` says what the modules must hold then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isqrt, prod

from regauge.anatomy.model import Anatomy, Norm, Site, Slot
from regauge.anatomy.streams import READERS, TABLES, WRITERS, with_streams

Shape = tuple[int, int]


def sizes(source: Anatomy, anatomy: Anatomy) -> dict[str, Shape]:
    """Site → (O, I) of every site whose shape is not the source's."""
    before = {site.name: site.shape for site in source.sites}
    return {site.name: site.shape for site in anatomy.sites if site.shape != before.get(site.name)}


def resized(anatomy: Anatomy, shapes: Mapping[str, Shape]) -> Anatomy:
    """The same anatomy with other shapes of some sites; heads keep their size, so their number follows.

    Raises:
        ValueError: no such site; or sites that meet in one stream, or lie in one stack, no longer fit together.
    """
    if not shapes:
        return anatomy
    known = {site.name for site in anatomy.sites}
    for name in shapes:
        if name not in known:
            raise ValueError(f"there is no site {name!r} to have a shape")
    sites = [_reshaped(site, shapes[site.name]) if site.name in shapes else site for site in anatomy.sites]
    wide = {site.shape[1] for site in sites if site.kind in ("embed", "head")}
    hidden = wide.pop() if len(wide) == 1 else anatomy.hidden
    rows = {site.name: site.shape[0] for site in sites}
    norms = [_fitting(norm, anatomy, rows, hidden) for norm in anatomy.norms]
    changed = replace(anatomy, sites=tuple(sites), norms=tuple(norms), hidden=hidden)
    check_sizes(changed)
    return with_streams(relaid(changed))


def _reshaped(site: Site, shape: Shape) -> Site:
    if min(shape) < 1:
        raise ValueError(f"{site.name} cannot be {shape[0]} x {shape[1]}")
    heads, channels = 0, shape[site.kind == "o"]
    if site.heads:
        heads, rest = divmod(channels, site.head_dim)
        if rest or not heads:
            raise ValueError(f"{site.name} has heads of {site.head_dim} channels, which do not divide {channels}")
    return replace(site, shape=(int(shape[0]), int(shape[1])), heads=heads)


def _fitting(norm: Norm, before: Anatomy, rows: Mapping[str, int], hidden: int) -> Norm:
    """The norm with the size of what it reads now: the residual, all heads of q or k where it is one long vector, or
    what the convolution before a batch norm gives."""
    if norm.kind == "batch":
        return replace(norm, size=rows[norm.name.removesuffix(".norm")])
    if norm.size == before.hidden and not norm.name.endswith((".q.norm", ".k.norm")):
        return replace(norm, size=hidden)
    owner = norm.name.removesuffix(".norm")
    if owner in rows and norm.size == before.site(owner).shape[0] != before.site(owner).head_dim:
        return replace(norm, size=rows[owner])
    return norm


def relaid(anatomy: Anatomy) -> Anatomy:
    """The anatomy with its slots where the shapes put them. The streams stay as they are."""
    shared: dict[tuple[str, int | None], list[Site]] = defaultdict(list)
    for site in anatomy.sites:
        shared[site.weight.key, site.weight.index].append(site)
    moved: dict[str, Site] = {}
    for some in shared.values():
        turns = next((one.heads // one.weight.span for one in some if one.heads), some[0].shape[0])
        start = 0
        for site in sorted(some, key=lambda one: one.weight.rows or (0, 0)):
            stop = start + site.shape[0]
            slots = [None if slot is None else _laid(slot, (start, stop), turns) for slot in (site.weight, site.bias)]
            if slots != [site.weight, site.bias] and slots[0] is not None:
                moved[site.name] = replace(site, weight=slots[0], bias=slots[1])
            start = stop
    if not moved:
        return anatomy
    return replace(anatomy, sites=tuple(moved.get(site.name, site) for site in anatomy.sites))


def _laid(slot: Slot, rows: tuple[int, int], turns: int) -> Slot:
    """A slot laid out anew.

    Args:
        turns: how often sites come in turn: once a head, or, where none has heads, once a row.
    """
    heads = None if slot.heads is None else (turns, *slot.heads[1:])
    return replace(slot, rows=None if slot.rows is None else rows, heads=heads)


def check_sizes(anatomy: Anatomy) -> None:
    """Raises ValueError, in a sentence, where sites no longer fit together."""
    units: dict[str, dict[str, Site]] = defaultdict(dict)
    stacks: dict[str, dict[Shape, str]] = defaultdict(dict)
    for site in anatomy.sites:
        if site.block is not None:
            units[site.name.rpartition(".")[0]][site.kind] = site
        if site.weight.index is not None:
            stacks[f"{site.weight.key} {site.kind}"].setdefault(site.shape, site.name)
    for stack, found in stacks.items():
        if len(found) > 1:
            told = " and ".join(f"{name} is {rows} x {columns}" for (rows, columns), name in list(found.items())[:2])
            raise ValueError(f"{stack.partition(' ')[0]} is one stack, whose experts keep one shape: {told}")
    for unit in units.values():
        _fit(unit, ("gate", 0), ("up", 0))
        _fit(unit, ("up", 0), ("down", 1))
        _fit(unit, ("q", 0), ("o", 1), "v", "q")
        if {"q", "k", "v"} <= unit.keys() and not (
            unit["k"].heads == unit["v"].heads and unit["q"].heads % max(unit["k"].heads, 1) == 0
        ):
            raise ValueError(
                f"{unit['q'].name} has {unit['q'].heads} heads beside {unit['k'].heads} of keys and "
                f"{unit['v'].heads} of values, which is no grouping"
            )
    _residual(anatomy)


def _fit(unit: Mapping[str, Site], writer: tuple[str, int], reader: tuple[str, int], *wide: str) -> None:
    """Two sites of a unit share a number of channels; with `wide` (v, q) it is counted in heads of v."""
    a, b = unit.get(writer[0]), unit.get(reader[0])
    if a is None or b is None:
        return
    made, read = a.shape[writer[1]], b.shape[reader[1]]
    if b.window:
        read = read // b.window if read % b.window == 0 else 0
    if wide and wide[0] in unit:
        made = unit[wide[1]].heads * unit[wide[0]].head_dim
    if made != read:
        raise ValueError(f"{a.name} writes {made} channels and {b.name} reads {read}")


def _residual(anatomy: Anatomy) -> None:
    if any("residual" in stop.streams and not stop.moves for stop in anatomy.plumbing.stops):
        return  # there is not one residual, of one width
    for site in anatomy.sites:
        if site.kind in TABLES or site.kind in READERS:
            width = site.shape[1]
        elif site.kind in WRITERS:
            width = site.shape[0]
        else:
            continue
        if width != anatomy.hidden:
            raise ValueError(f"{site.name} meets a residual of {anatomy.hidden} channels with {width}")


def parameter_shapes(anatomy: Anatomy, like: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Parameter key → shape, of the parameters in `like` that hold sites or norms.

    Args:
        like: the parameters' shapes in the source, which say how many axes each has.
    """
    found: dict[str, tuple[int, ...]] = {}
    stacks: dict[str, dict[int | None, list[Site]]] = defaultdict(lambda: defaultdict(list))
    for site in anatomy.sites:
        stacks[site.weight.key][site.weight.index].append(site)
    for key, stack in stacks.items():
        if key in like:
            found[key] = _whole(stack, like[key])
        sharing = next(iter(stack.values()))
        biases = [site.bias.key for site in sharing if site.bias is not None]
        if biases and biases[0] in like:
            rows = sum(site.shape[0] for site in sharing)
            found[biases[0]] = (rows,) if None in stack else (len(stack), rows)
    for norm in anatomy.norms:
        found |= {slot.key: (norm.size,) for slot in norm.slots.values() if slot.key in like}
    return found


def _whole(stack: Mapping[int | None, Iterable[Site]], like: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one parameter from those of the sites in it."""
    first = list(next(iter(stack.values())))
    rows, columns = sum(site.shape[0] for site in first), first[0].shape[1]
    if first[0].weight.index is not None:
        return (len(stack), columns, rows) if first[0].weight.transposed else (len(stack), rows, columns)
    if first[0].weight.transposed:
        return (columns, rows)
    if len(like) == 2:
        return (rows, columns)
    if first[0].kind in TABLES:
        return (*like[:-1], columns)
    return windowed((rows, columns), first[0].window, like) if first[0].window else (rows, *like[1:])


def windowed(shape: Shape, window: int, like: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a convolution's parameter of so many places, of the source's where those are as many."""
    places = like[2:] if prod(like[2:]) == window else (isqrt(window), isqrt(window))
    return (shape[0], shape[1] // window, *places)
