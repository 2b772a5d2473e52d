"""Families as the engine makes them: what a recipe offers is held against the sizes of the model and the groups of its
formats. (Streams are sorted before anything is rounded: `plan/sorting.py`.)

A share that does not come to whole groups is rounded, and the receipt says to what; a count that does not is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from regauge import parts
from regauge.anatomy.members import member_of
from regauge.anatomy.model import Anatomy, Site
from regauge.artifact.codec.base import Layout, decoder
from regauge.artifact.codec.choose import Chosen
from regauge.elastic.dimensions import BY_NAME, MULTIPLE, SHARE
from regauge.elastic.family import Family, in_any_order, unranked
from regauge.elastic.legal import cut_of, reasons, settled
from regauge.elastic.subnet import Subnet
from regauge.engine.refusals import Refusals
from regauge.errors import MoveError, RecipeError, SettingError
from regauge.formats.prefixes import FEWEST
from regauge.plan.resolution import Resolution


def offering(
    family: Family | None, resolution: Resolution | None, chosen: Chosen | None, told: Refusals
) -> tuple[Family | None, Resolution | None]:
    """The family that a plan asks for, on the layout that was chosen, and the resolution with what is to be told of it;
    refusals go where the others are."""
    if family is None or resolution is None or chosen is None:
        return family, resolution
    found, notes = told.attempt(lambda: offered_by(family, chosen.wire.layout), (family, list[str]()))
    return found, replace(resolution, notes=[*resolution.notes, *notes])


def offered_by(family: Family, layout: Layout) -> tuple[Family, list[str]]:
    """The family with its multiple decided, and what was rounded, a sentence each.

    Raises:
        RecipeError: the model cannot have it, or a format does not come apart there; every reason.
    """
    anatomy, later = layout.anatomy, unranked(family)
    family = in_any_order(family, anatomy.blocks)
    wrong = reasons(family, anatomy)
    if layout.attention:
        wrong.append("blocks that take another's attention map, or whose heads see a window, have no members")
    if not wrong:
        family = replace(family, multiple=_multiple(family, layout))
        wrong = list(dict.fromkeys(why for one in _each(family, anatomy) for why in _of_member(one, family, layout)))
    wrong += _of_bits(family, layout)
    if wrong:
        raise RecipeError(f"this model cannot be such a family: {'; '.join(wrong)}")
    told = list(_rounded(family, anatomy))
    return (replace(family, ranked=()) if later else family), told


def _multiple(family: Family, layout: Layout) -> int:
    """What numbers of neurons and channels are rounded to: whole groups of every matrix that reads them."""
    sites = [site for site in layout.anatomy.sites if site.name in layout.quantised]
    wanted = [family.multiple or 1]
    for name, kinds in (("ffn", ("down",)), ("width", ("q", "k", "v", "gate", "up", "router", "head", "embed"))):
        if not family.choices(name):
            continue
        size = min(
            stream.size
            for some in BY_NAME[name].streams(layout.anatomy, range(layout.anatomy.blocks)).values()
            for stream in some
        )
        if not family.multiple:
            step = MULTIPLE
            while step > 1 and step * SHARE > size:
                step //= 2
            wanted.append(step)
        wanted += [_span(site, layout) for site in sites if site.kind in kinds]
    return math.lcm(*wanted)


def _span(site: Site, layout: Layout) -> int:
    """Inputs of a site that must stay together."""
    fmt = decoder(layout.quantised[site.name])
    span = fmt.grain.span(site.shape)
    point = layout.reading(site)
    read = 1 if point is None else parts.format_of(point).grain.span((2, site.shape[1]))
    return math.lcm(*(one if one < site.shape[1] else 1 for one in (span, read)), fmt.grid.run)


def _of_bits(family: Family, layout: Layout) -> list[str]:
    """Why weights cannot be read at the bits that a family offers, a sentence each."""
    grids = [grid for point in layout.quantised.values() if (grid := decoder(point).grid).coarsest is not None]
    if family.bits and not grids:
        return ["bits: no weights hold several precisions: give them grid: nested:8"]
    most = min((grid.bits for grid in grids), default=8)
    return [f"bits {bits}: weights have {FEWEST} to {most}" for bits in family.bits if not FEWEST <= bits <= most]


def _each(family: Family, anatomy: Anatomy) -> Iterator[Subnet]:
    """Every choice by itself."""
    for name in family.offered:
        if name in ("bits", "cache", "experts"):
            continue
        for value in family.choices(name):
            yield Subnet(**{name: value})  # type: ignore[arg-type]  # a choice of that dimension


def _of_member(asked: Subnet, family: Family, layout: Layout) -> Iterator[str]:
    """Why a model has no such member."""
    try:
        subnet = settled(asked, family, layout.anatomy)
        cut = cut_of(subnet, family, layout.anatomy)
        member = member_of(layout.anatomy, cut.blocks, cut.kept, kernels=cut.kernels)
    except (SettingError, MoveError, ValueError) as error:
        yield str(error)
        return
    name = next(iter(asked.said()))[0]
    for site in member.anatomy.sites:
        whole = layout.anatomy.site(member.origin(site.name))
        if site.shape == whole.shape:
            continue
        point = layout.quantised.get(whole.name)
        if point is None:
            if site.weight.rows is not None and site.shape[0] != whole.shape[0]:
                yield f"{name}: {whole.name} lies behind another in one matrix, whose first rows do not hold its own"
                return
            continue
        fmt = decoder(point)
        if member.window(site) and fmt.grain.span(whole.shape) < whole.shape[1]:
            yield f"{asked}: {whole.name} has several steps a row, each of several places: give it a step a row"
            return
        why = fmt.grain.refuses(site.shape) or ("" if site.shape[1] % fmt.grid.run == 0 else "runs of codes are cut")
        if why:  # of one block, as of all
            yield f"{asked}: {whole.name}, {site.shape[0]} x {site.shape[1]}: {why}"
            return
        read = layout.reading(whole)
        if read is not None and site.shape[1] != whole.shape[1]:
            transform = read.name("transform")
            if transform not in ("", "none", "identity"):
                yield f"{name}: {whole.tap} is read through {transform}, which mixes all of its channels"


def _rounded(family: Family, anatomy: Anatomy) -> Iterator[str]:
    """What shares came to, where that is not what they say."""
    for name in ("ffn", "width"):
        for value in family.choices(name):
            if not isinstance(value, float):
                continue
            kept = BY_NAME[name].kept(value, range(anatomy.blocks), family, anatomy)
            sizes = {(anatomy.stream(stream).size, count) for stream, count in kept.items()}
            for size, count in sorted(sizes):
                if count != value * size:
                    yield f"family: {name} {value:g} is {count} of {size}, in steps of {family.multiple}"
