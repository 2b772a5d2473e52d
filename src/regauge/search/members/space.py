"""Members as genes, and what each takes: bytes by the formats, milliseconds by products timed on this machine.

A gene is a place's choice, 0 the whole: whether each block stays, its share of neurons, its groups of heads; and once
for all blocks the channels of the residual, and how many experts a token goes to. What a member takes is the sum of
what its blocks take, so a table with an entry for each choice of a block answers for every member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from regauge.anatomy.model import Anatomy, Site
from regauge.artifact.codec.base import Layout
from regauge.artifact.codec.sizes import site_bytes
from regauge.artifact.files import weight_bytes
from regauge.elastic.dimensions import BY_NAME
from regauge.elastic.family import Family
from regauge.elastic.legal import cut_of, member_in, settled
from regauge.elastic.subnet import Amount, Subnet
from regauge.search.evolution import Genes, Space

INNER = ("ffn", "heads")
"""Dimensions that are chosen block by block."""
ONCE = ("width", "experts")
"""Dimensions that are chosen once for all blocks."""
Weigh = Callable[[Site, float], float]
"""What a site takes, in whatever unit; its shape is the member's, and the share of the tokens that reach it: 1, but of
an expert what its router sends there on average."""


@dataclass(frozen=True, eq=False)
class Members:
    """The members of a family as genes.

    Attributes:
        menus: dimension → its choices, the whole (None) first, the others from the largest to the smallest.
        counts: how many blocks a member may have.
    """

    family: Family
    anatomy: Anatomy
    menus: Mapping[str, tuple[Amount | None, ...]]
    counts: frozenset[int]

    @staticmethod
    def of(family: Family, anatomy: Anatomy) -> Members:
        """Those of an artifact's family."""
        menus: dict[str, tuple[Amount | None, ...]] = {}
        for name in (*INNER, *ONCE):
            found = dict[int, Amount | None]()
            for value in family.choices(name):
                if not settled(Subnet(**{name: value}), family, anatomy).full:  # type: ignore[arg-type]  # a choice of that dimension
                    found.setdefault(-_left(name, value, family, anatomy), value)  # type: ignore[arg-type]  # no dimension of words
            if found:
                menus[name] = (None, *(found[size] for size in sorted(found)))
        legal = [settled(Subnet(depth=value), family, anatomy) for value in family.depth]
        counts = {len(cut_of(subnet, family, anatomy).blocks) for subnet in legal} | {anatomy.blocks}
        return Members(family, anatomy, menus, frozenset(counts))

    @property
    def choices(self) -> tuple[int, ...]:
        """How many choices there are at each place: blocks, each inner dimension block by block, width, experts."""
        blocks = self.anatomy.blocks
        found = [2 if len(self.counts) > 1 else 1] * blocks
        for name in INNER:
            found += [len(self.menus.get(name, (None,)))] * blocks
        return (*found, *(len(self.menus.get(name, (None,))) for name in ONCE))

    def kept(self, genes: Genes) -> tuple[int, ...]:
        """The blocks that stay."""
        return tuple(block for block in range(self.anatomy.blocks) if not genes[block])

    def legal(self, genes: Genes) -> bool:
        kept = self.kept(genes)
        return len(kept) in self.counts and set(kept).issuperset(self.anatomy.plumbing.stays)

    def space(self, table: Table) -> Space:
        """What a search may choose, by what it takes."""
        return Space(self.choices, table, self.legal)

    def subnet(self, genes: Genes) -> Subnet:
        """The member, as its family says it."""
        blocks, kept = self.anatomy.blocks, self.kept(genes)
        said: dict[str, Any] = {} if len(kept) == blocks else {"depth": kept if len(kept) > 1 else len(kept)}
        for number, name in enumerate(INNER, 1):
            menu = self.menus.get(name)
            if menu is not None:
                picks = [menu[genes[number * blocks + block]] for block in kept]
                whole: Amount = 1.0 if name == "ffn" else self._groups(name)
                said[name] = tuple(whole if pick is None else pick for pick in picks)
        for name, pick in zip(ONCE, genes[-len(ONCE) :], strict=True):
            if pick:
                said[name] = self.menus[name][pick]
        said = {
            name: value[0] if isinstance(value, tuple) and len(value) == 1 else value for name, value in said.items()
        }
        return settled(Subnet(**said), self.family, self.anatomy)

    def _groups(self, name: str) -> int:
        streams = BY_NAME[name].streams(self.anatomy, range(self.anatomy.blocks))
        return int(max(stream.size for some in streams.values() for stream in some))

    def alike(self) -> Iterator[Genes]:
        """Members that choose the same in every block: each count of blocks, by the family's rule, with each choice."""
        blocks = self.anatomy.blocks
        menus = [range(len(self.menus.get(name, (None,)))) for name in (*INNER, *ONCE)]
        for count in sorted(self.counts, reverse=True):
            stay = (
                set(range(blocks))
                if count == blocks
                else set(BY_NAME["depth"].blocks(count, self.family, self.anatomy))
            )
            gone = tuple(int(block not in stay) for block in range(blocks))
            for picks in product(*menus):
                inner, once = picks[: len(INNER)], picks[len(INNER) :]
                yield (*gone, *(pick for pick in inner for _ in range(blocks)), *once)


@dataclass(frozen=True, eq=False)
class Table:
    """What members take of one resource.

    Attributes:
        of: (block, choice of neurons, of heads, of width, of experts) → what the block takes.
        outside: choice of width → what lies outside the blocks takes.
    """

    members: Members
    of: Mapping[tuple[int, ...], float]
    outside: tuple[float, ...]

    @staticmethod
    def made(members: Members, weigh: Weigh) -> Table:
        """A table of a resource that is a sum over sites.

        Args:
            weigh: what a site takes, as a member has it; its name is the whole's.
        """
        family, anatomy = members.family, members.anatomy
        every, found, outer = range(anatomy.blocks), dict[tuple[int, ...], float](), list[float]()
        names = (*INNER, *ONCE)
        menus = [members.menus.get(name, (None,)) for name in names]
        for picks in product(*(range(len(menu)) for menu in menus)):
            said = {
                name: menu[pick] for name, menu, pick in zip(names, menus, picks, strict=True) if menu[pick] is not None
            }
            cut = member_in(Subnet(**said), family, anatomy).anatomy  # type: ignore[arg-type]  # choices of the dimensions
            share = routed_share(cut)
            for number in every:
                found[number, *picks] = sum(weigh(site, share(site)) for site in cut.in_block(number))
            if not any(picks[: len(INNER)]) and not picks[-1]:
                outer.append(sum(weigh(site, 1.0) for site in cut.in_block(None)))
        return Table(members, found, tuple(outer))

    @staticmethod
    def of_bytes(members: Members, weigh: Weigh, folder: Path) -> Table:
        """Bytes of members, what a family has beside its matrices counted whole."""
        found = Table.made(members, weigh)
        beside = weight_bytes(folder) - found((0,) * len(members.choices))
        return replace(found, outside=tuple(one + beside for one in found.outside))

    def __call__(self, genes: Genes) -> float:
        blocks, once = self.members.anatomy.blocks, genes[-len(ONCE) :]
        stay = self.members.kept(genes)
        return self.outside[once[0]] + sum(
            self.of[block, genes[blocks + block], genes[2 * blocks + block], *once] for block in stay
        )


def _left(name: str, value: Any, family: Family, anatomy: Anatomy) -> int:
    """What a choice of a dimension leaves, to sort choices by."""
    if name == "experts":
        return int(value)
    return sum(BY_NAME[name].kept(value, range(anatomy.blocks), family, anatomy).values())


def routed_share(anatomy: Anatomy) -> Callable[[Site], float]:
    """Site → the share of the tokens that reach it. Of an expert, that of an even router: how many a token goes to, of
    all; where a model does not say how many, all."""
    experts: dict[int | None, set[int]] = {}
    for site in anatomy.sites:
        if site.expert is not None:
            experts.setdefault(site.block, set()).add(site.expert)
    used = anatomy.plumbing.routed
    return lambda site: 1.0 if site.expert is None or not used else used / len(experts[site.block])


def stored(layout: Layout) -> Weigh:
    """Bytes of a site in the files of a member, however few tokens reach it; norms and their biases are not counted."""
    return lambda site, _: float(site_bytes(layout, site))
