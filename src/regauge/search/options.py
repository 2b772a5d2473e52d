"""What each site may become, and which sites must choose together.

An option is a `Choice` built from the parts (integers of 2 to 8 bits, group-wise or by channel, GPTQ rounding with a
searched range), or full precision. Sites whose weights one module computes (fused q, k, v) share one choice, as do the
experts of a block, since their stack is stored as one. `fuse=True` also ties q, k, v and gate, up, as runtimes that
concatenate them at load time need. A tied head has the embedding's bytes, so the two are one choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from regauge import parts
from regauge.anatomy.model import Anatomy, Site
from regauge.parts import Choice, Spec
from regauge.plan import Plan, Rule

SKIPPED = frozenset({"router", "position", "type", "patch"})
"""Kinds that the search leaves in full precision: small, and nothing is known of how they bear rounding."""
LEAST = 4096
"""Weights below which a site is left whole: its bytes do not pay for the risk."""
FULL = "full"


@dataclass(frozen=True)
class Option:
    """One way to store a site. `choice` None: as it is."""

    name: str
    choice: Choice | None

    @property
    def bits(self) -> int:
        """Bits of a code, steps not counted; 16 for full precision."""
        return 16 if self.choice is None else int(parts.build("grid", self.choice.grid).bits)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that share one choice, with the options all of them can take."""

    name: str
    sites: tuple[Site, ...]
    options: tuple[Option, ...]

    @property
    def kind(self) -> str:
        return self.sites[0].kind

    @property
    def block(self) -> int | None:
        return self.sites[0].block

    def option(self, name: str) -> Option:
        return next(option for option in self.options if option.name == name)


def integer(bits: int, group: int | None, looked_up: bool = False) -> Option:
    """`int4-g32`: asymmetric below 8 bits; tables looked up by index have no input, so they round to nearest."""
    grid = "int8" if bits == 8 else f"int{bits}-asym"
    grain = Spec("channel") if group is None else Spec("group", (("size", group),))
    choice = Choice(
        grid=Spec(grid),
        grain=grain,
        ranger=Spec("search"),
        scale=Spec("bf16"),
        rounder=Spec("nearest" if looked_up else "gptq"),
    )
    return Option(f"int{bits}-{'channel' if group is None else f'g{group}'}", choice)


def groups_of(width: int) -> list[int | None]:
    """Two grains that cut a width: the coarsest of 128 and 64 that divides it (else a channel), and 32."""
    coarse = next((size for size in (128, 64) if width % size == 0), None)
    return [coarse, 32] if width % 32 == 0 and width > 32 else [coarse]


def menu(site: Site, bits: Sequence[int] = (2, 3, 4, 5, 6, 8), full: bool = True) -> tuple[Option, ...]:
    """The options of one site, cheapest bits first."""
    found: list[Option] = []
    for width in bits:
        grains: list[int | None] = [None] if width == 8 else groups_of(site.shape[1])
        found += [integer(width, group, looked_up=site.tap is None) for group in grains]
    if full:
        found.append(Option(FULL, None))
    return tuple(option for option in found if fits(site, option))


def fits(site: Site, option: Option) -> bool:
    """Whether the grain can cut the site."""
    if option.choice is None:
        return True
    return parts.format_of(option.choice).grain.refuses(site.shape) is None


def site_groups(
    anatomy: Anatomy, bits: Sequence[int] = (2, 3, 4, 5, 6, 8), fuse: bool = False, full: bool = True
) -> tuple[SiteGroup, ...]:
    """Every choice that the search makes, in the order of the model: embedding, blocks, head."""
    together: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        if site.kind in SKIPPED or (site.name == "head" and anatomy.tied):
            continue
        if site.expert is None and site.shape[0] * site.shape[1] < LEAST:
            continue
        together.setdefault(_key(site, fuse), []).append(site)
    found = []
    for sites in together.values():
        options = menu(sites[0], bits, full)
        options = tuple(option for option in options if all(fits(site, option) for site in sites))
        found.append(SiteGroup(sites[0].name, tuple(sites), options))
    return tuple(found)


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
    rules: dict[Choice | None, list[str]] = {}
    for group in groups:
        rules.setdefault(picks[group.name].choice, []).extend(site.name for site in group.sites)
    return Plan(
        name=name,
        rules=tuple(Rule(" | ".join(names), choice) for choice, names in rules.items()),
        title=title,
        calibration={"tokens": tokens, "length": length},
    )
