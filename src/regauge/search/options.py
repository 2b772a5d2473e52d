"""What each site may become, and which sites must choose together.

An option is a point on the weights built from what the table of parts offers (`Part.offers`), or full precision: a new
grid reaches the search by being in the table. Sites whose weights one module computes (fused q, k, v) share one choice,
as do the experts of a block, since their stack is stored as one. `fuse=True` also ties q, k, v and gate, up, as
runtimes that concatenate them at load time need. A tied head has the embedding's bytes, so the two are one choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from regauge import parts
from regauge.anatomy.model import Anatomy, Attention, Site
from regauge.formats.runs import refusal
from regauge.parts import CACHE, PLACES, TABLE, WEIGHTS, Point, Spec
from regauge.plan import Plan, Rule
from regauge.plan.keeping import bits_of

SKIPPED = frozenset({"router", "position", "type", "patch"})
"""Kinds that the search leaves in full precision: small, and nothing is known of how they bear rounding."""
LEAST = 4096
"""Weights below which a site is left whole: its bytes do not pay for the risk."""
LEAST_WINDOWED = 1024
"""The same of a convolution, whose weights are used at every place of an image."""
FULL = "full"


@dataclass(frozen=True)
class Option:
    """One way to store a site. `choice` None: as it is."""

    name: str
    choice: Point | None

    @property
    def bits(self) -> int:
        """Bits of a code, steps not counted; 16 for full precision; of a store the more of keys' and values'."""
        if self.choice is not None and self.choice.place == CACHE:
            return max(bits_of(self.choice))
        return 16 if self.choice is None else int(parts.build("grid", self.choice.spec("grid")).bits)


@dataclass(frozen=True)
class Store:
    """A block's keys and values.

    Attributes:
        tokens: at which their bytes count.
    """

    block: int
    sizes: Attention
    tokens: int


@dataclass(frozen=True)
class SiteGroup:
    """Sites that share one choice, or a store that has one, with the options all of them can take.

    Attributes:
        sites: none where it is a store's.
    """

    name: str
    sites: tuple[Site, ...]
    options: tuple[Option, ...]
    store: Store | None = None

    @property
    def kind(self) -> str:
        return "cache" if self.store is not None else self.sites[0].kind

    @property
    def block(self) -> int | None:
        return self.store.block if self.store is not None else self.sites[0].block

    def option(self, name: str) -> Option:
        return next(option for option in self.options if option.name == name)


def option(grid: str, grain: str, looked_up: bool = False) -> Option:
    """`int4-g32`: a grid and a grain, and of every other axis the best that is offered to such a site.

    Args:
        looked_up: the site is a table looked up by index: it has no input that a part could learn from.
    """
    specs: dict[str, Spec] = {"grid": Spec(grid), "grain": parts.read("grain", grain, WEIGHTS)}
    for axis in PLACES[WEIGHTS].axes:
        offered = [name for name, found in TABLE[axis.parts].items() if WEIGHTS in found.offers]
        served = [name for name in offered if not (looked_up and TABLE[axis.parts][name].text)]
        if axis.name not in specs and served:
            specs[axis.name] = Spec(served[-1])
    for axis in reversed(PLACES[WEIGHTS].axes):  # what a grid wants beside it stands above what a rounder does
        named = TABLE[axis.parts][specs[axis.name].part].beside if axis.name in specs else {}
        specs |= {other: parts.read(other, text, WEIGHTS) for other, text in named.items()}
    kind, _, size = grain.partition(":")
    return Option(f"{grid.removesuffix('-asym')}-{kind[0] + size if size else kind}", Point.of(WEIGHTS, specs))


def integer(bits: int, group: int | None, looked_up: bool = False) -> Option:
    """`int4-g32`: asymmetric below 8 bits; tables looked up by index have no input, so they round to nearest."""
    return option("int8" if bits == 8 else f"int{bits}-asym", f"group:{group}" if group else "channel", looked_up)


def menu(site: Site, bits: Sequence[int] | None = None, full: bool = True) -> tuple[Option, ...]:
    """The options of one site, cheapest bits first: each grid on offer with the grains on offer beside it that cut it.

    Args:
        bits: only grids of so many bits; None: all.
    """
    found: list[Option] = []
    for grid, part in TABLE["grid"].items():
        if WEIGHTS not in part.offers or (bits is not None and parts.build("grid", Spec(grid)).bits not in bits):
            continue
        seen: set[tuple[int, int]] = set()
        for chain in part.offers[WEIGHTS]:
            grain = _first(chain, site.shape)
            cut = parts.build("grain", parts.read("grain", grain)).groups(site.shape) if grain else None
            if cut is not None and cut not in seen:
                seen.add(cut)
                found.append(option(grid, grain, looked_up=site.tap is None))
    found.sort(key=lambda option: option.bits)
    return (*found, Option(FULL, None)) if full else tuple(found)


def _first(chain: str, shape: tuple[int, int]) -> str:
    """The first grain of `a else b` that cuts a shape, "" where none does."""
    for grain in chain.split(" else "):
        if parts.build("grain", parts.read("grain", grain)).refuses(shape) is None:
            return grain
    return ""


def fits(site: Site, option: Option) -> bool:
    """Whether the grain can cut the site."""
    if option.choice is None:
        return True
    return refusal(parts.format_of(option.choice), site.shape) is None


def site_groups(
    anatomy: Anatomy, bits: Sequence[int] | None = None, fuse: bool = False, full: bool = True
) -> tuple[SiteGroup, ...]:
    """Every choice that the search makes, in the order of the model: embedding, blocks, head."""
    together: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        if site.kind in SKIPPED or (site.name == "head" and anatomy.tied):
            continue
        if site.block is None and site.name != "head" and not anatomy.causal:
            continue  # of images: tables of classes, and how a class moves the head, whose losses nothing foretells
        if site.expert is None and _small(site) and not fuse:
            continue
        together.setdefault(_key(site, fuse), []).append(site)
    found = []
    for sites in together.values():
        if sites[0].expert is None and all(map(_small, sites)):  # what is stacked is left whole together, or not
            continue
        options = menu(sites[0], bits, full)
        options = tuple(option for option in options if all(fits(site, option) for site in sites))
        found.append(SiteGroup(sites[0].name, tuple(sites), options))
    return tuple(found)


def _small(site: Site) -> bool:
    return site.shape[0] * site.shape[1] < (LEAST_WINDOWED if site.window else LEAST)


def _key(site: Site, fuse: bool) -> str:
    if site.expert is not None:
        return f"experts:{site.block}:{'down' if site.kind == 'down' else 'up'}"
    if fuse and site.kind in ("q", "k", "v"):
        return f"qkv:{site.block}"
    if fuse and site.kind in ("gate", "up"):
        return f"gate-up:{site.block}"
    return f"module:{site.module}"


def site_bytes(site: Site, option: Option, itemsize: int) -> int:
    """Bytes stored for a site's weight; `itemsize` is that of the source's dtype."""
    if option.choice is None:
        return site.shape[0] * site.shape[1] * itemsize
    return parts.format_of(option.choice).bytes(site.shape)


def group_bytes(group: SiteGroup, option: Option, itemsize: int) -> int:
    return sum(site_bytes(site, option, itemsize) for site in group.sites)


def plan_of(
    picks: Mapping[str, Option], groups: Iterable[SiteGroup], name: str, title: str, tokens: int, length: int
) -> Plan:
    """A recipe that names every site: one rule an option, sites joined by `|`."""
    rules: dict[Point | None, list[str]] = {}
    kept: dict[Point, list[str]] = {}
    for group in groups:
        choice = picks[group.name].choice
        if group.store is None:
            rules.setdefault(choice, []).extend(site.name for site in group.sites)
        elif choice is not None:
            kept.setdefault(choice, []).append(group.name)
    places = {WEIGHTS: tuple(Rule(" | ".join(names), point) for point, names in rules.items())}
    if kept:
        places[CACHE] = tuple(Rule(" | ".join(names), point) for point, names in kept.items())
    return Plan(
        name=name,
        places=places,
        title=title,
        calibration={"tokens": tokens, "length": length},
    )
