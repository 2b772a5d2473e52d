"""What may be chosen along each dimension, which choices a model admits, and what they come to in units of streams.

A dimension answers three questions: why a model cannot have the choices of a family (`refuses`), what a subnet's value
is in it or which is nearest (`settle`), and what it leaves: how many units of which stream stay (`kept`), which blocks
(`depth.py`), kernels of which side (`kernels.py`). Legend: D blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regauge.anatomy.model import Anatomy, Stream
from regauge.elastic.depth import Depth
from regauge.elastic.kernels import Kernel
from regauge.elastic.offers import Offers, Settled, listed, units
from regauge.elastic.subnet import TOKEN, Amount, Subnet

MULTIPLE = 64
"""Neurons that the usual group sizes and every panel divide."""
SHARE = 8
"""The automatic multiple is at most this part of the layer."""
NO_EXPERTS = "the model has no experts (regauge learn smoe-dropout divides a dense one into some)"


@dataclass(frozen=True)
class Prefix:
    """How many units of streams stay, the first ones: neurons, groups of heads or channels of the residual."""

    name: str
    kind: str
    units: str

    def streams(self, anatomy: Anatomy, blocks: Sequence[int]) -> dict[int | None, list[Stream]]:
        """Block → its streams of the kind, in the order of the blocks; the residual is of no block."""
        found: dict[int | None, list[Stream]] = {block: [] for block in blocks} if self.kind != "residual" else {}
        for stream in anatomy.streams:
            if stream.kind == self.kind and (stream.block in found or self.kind == "residual"):
                found.setdefault(stream.block, []).append(stream)
        return {block: some for block, some in found.items() if some}

    def refuses(self, choices: Sequence[Any], family: Offers, anatomy: Anatomy) -> Iterator[str]:
        every = self.streams(anatomy, range(anatomy.blocks))
        if not every:
            yield f"{self.name}: the model has no {self.units} that could be left out"
        for stream in (stream for some in every.values() for stream in some):
            if "select" not in stream.admits:
                why = stream.stops.get("select", f"none of its {self.units} can be left out")
                yield f"{self.name}: {stream.name}: {why}"
                return
        sizes = sorted({stream.size for some in every.values() for stream in some})
        for value in choices:
            if isinstance(value, int) and sizes and not 1 <= value <= sizes[0]:
                yield f"{self.name} {value}: there are {sizes[0]} {self.units}"

    def settle(self, value: Any, family: Offers, anatomy: Anatomy, before: Subnet) -> Settled:
        if value == TOKEN:
            return (value, "") if family.choices(self.name) else (None, f"{self.name}={value}: this family has one")
        every = self.streams(anatomy, BY_NAME["depth"].blocks(before.depth, family, anatomy))
        values = value if isinstance(value, tuple) else (value,) * len(every)
        if len(values) != len(every):
            return None, f"{self.name} has {len(values)} numbers for {len(every)} blocks that run"
        found, wrong = [], ""
        for one, some in zip(values, every.values(), strict=True):
            near, legal = self._near(one, some[0].size, family)
            found.append(near)
            if not self._same(one, near, some[0].size, family) and not wrong:
                wrong = f"{self.name}={one}, of {listed(legal)}"
        if all(self._whole(one, some[0].size, family) for one, some in zip(found, every.values(), strict=True)):
            return None, wrong
        return (found[0] if len(set(found)) == 1 else tuple(found)), wrong

    def _near(self, value: Amount, size: int, family: Offers) -> tuple[Amount, list[Amount]]:
        """The choice whose units are nearest to those of a value, the larger of two; and all choices there are."""
        whole: Amount = 1.0 if self.name == "ffn" else size
        choices = [*family.choices(self.name), whole]
        wanted = self._count(value, size, family, rounded=False)
        near = min(choices, key=lambda one: (abs(self._count(one, size, family, False) - wanted), -one))
        return near, sorted(choices, reverse=True)

    def _same(self, value: Amount, near: Amount, size: int, family: Offers) -> bool:
        """Whether a value means a choice: its units, or those that it comes to in whole groups."""
        wanted = self._count(value, size, family, rounded=False)
        return any(abs(wanted - self._count(near, size, family, rounded)) < 0.5 for rounded in (True, False))

    def _whole(self, value: Amount, size: int, family: Offers) -> bool:
        return self._count(value, size, family) == size

    def _count(self, value: Amount, size: int, family: Offers, rounded: bool = True) -> float:
        """Units of a stream that a value means."""
        if isinstance(value, int):
            return value
        if not rounded:
            return value * size
        return units(value, size, self.multiple(size, family))

    def multiple(self, size: int, family: Offers) -> int:
        """What a number of units is rounded to where it is given as a share."""
        if self.name == "heads":
            return 1
        if family.multiple:
            return min(family.multiple, size)
        step = MULTIPLE
        while step > 1 and step * SHARE > size:
            step //= 2
        return step

    def kept(self, value: Any, blocks: Sequence[int], family: Offers, anatomy: Anatomy) -> Mapping[str, int]:
        """Stream → units, of those that lose some."""
        every = self.streams(anatomy, blocks) if value != TOKEN else {}
        values = value if isinstance(value, tuple) else (value,) * len(every)
        found: dict[str, int] = {}
        for one, some in zip(values, every.values(), strict=True):
            for stream in some:
                count = int(self._count(one, stream.size, family))
                if count < stream.size:
                    found[stream.name] = count
        return found


@dataclass(frozen=True)
class Listed:
    """A value that is one of a list: what is kept of the past, bits."""

    name: str
    what: str

    def refuses(self, choices: Sequence[Any], family: Offers, anatomy: Anatomy) -> Iterator[str]:
        if self.name == "cache" and not anatomy.cached:
            yield "cache: the model keeps no past"

    def settle(self, value: Any, family: Offers, anatomy: Anatomy, before: Subnet) -> Settled:
        legal = family.choices(self.name)
        if self.name == "bits" and isinstance(value, tuple):
            return self._several(value, family, anatomy, before)
        if value in legal:
            return value, ""
        if not legal:
            return None, f"{self.name}={value}: this family has one {self.what}"
        numbers = not isinstance(value, str) and not isinstance(value, tuple)
        near = min(legal, key=lambda one: abs(one - value)) if numbers else None
        return near, f"{self.name}={value}, of {listed(legal)}"

    def _several(self, value: tuple[int, ...], family: Offers, anatomy: Anatomy, before: Subnet) -> Settled:
        """Bits of each block that runs."""
        legal, blocks = family.choices(self.name), BY_NAME["depth"].blocks(before.depth, family, anatomy)
        if len(value) != len(blocks):
            return None, f"{self.name} has {len(value)} numbers for {len(blocks)} blocks that run"
        if not legal:
            return self.settle(value[0], family, anatomy, before)
        near = tuple(min(legal, key=lambda choice: (abs(choice - one), -choice)) for one in value)
        found = near[0] if len(set(near)) == 1 else near
        return found, "" if near == value else f"{self.name}={'/'.join(map(str, value))}, each of {listed(legal)}"


@dataclass(frozen=True)
class Experts:
    """How many experts a token goes to, of those that its router finds best."""

    name: str = "experts"

    def refuses(self, choices: Sequence[Any], family: Offers, anatomy: Anatomy) -> Iterator[str]:
        if why := self._none(anatomy):
            yield f"experts: {why}"
            return
        for count in choices:
            if count > anatomy.plumbing.routed:
                yield f"experts {count}: a token goes to {anatomy.plumbing.routed}"

    def settle(self, value: Any, family: Offers, anatomy: Anatomy, before: Subnet) -> Settled:
        if why := self._none(anatomy):
            return None, f"experts={value}: {why}"
        whole = anatomy.plumbing.routed
        legal = sorted({*family.choices(self.name), whole})
        near = min(legal, key=lambda one: (abs(one - value), -one))
        return None if near == whole else near, "" if near == value else f"experts={value}, of {listed(legal)}"

    def _none(self, anatomy: Anatomy) -> str:
        if anatomy.plumbing.routed:
            return ""
        some = any(site.expert is not None for site in anatomy.sites)
        return "the router of this model takes no fewer" if some else NO_EXPERTS


BY_NAME: Mapping[str, Any] = {
    "depth": Depth(),
    "ffn": Prefix("ffn", "ffn", "neurons"),
    "heads": Prefix("heads", "heads", "groups of heads"),
    "width": Prefix("width", "residual", "channels of the residual"),
    "experts": Experts(),
    "bits": Listed("bits", "precision"),
    "cache": Listed("cache", "cache"),
    "kernel": Kernel(),
}
