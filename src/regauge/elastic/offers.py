"""What a dimension reads of a family, what it answers, and what a subnet comes to in one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from regauge.anatomy.model import Anatomy
from regauge.elastic.subnet import Subnet

Settled = tuple[Any, str]
"""A legal value, and why the one that was asked for is not legal; "" where it is."""


@dataclass(frozen=True)
class Cut:
    """What a subnet comes to in one model.

    Attributes:
        blocks: those that run, in their order.
        kept: stream of the whole → units that stay, the first ones; absent: all.
        experts: how many a token goes to; None: as the model says.
        bits, cache: as the subnet says.
        kernels: block → side of its convolutions' kernels, of those that lose some.
    """

    blocks: tuple[int, ...]
    kept: dict[str, int]
    experts: int | None = None
    bits: int | tuple[int, ...] | None = None
    cache: str | None = None
    kernels: Mapping[int, int] = field(default_factory=dict)


@runtime_checkable
class Offers(Protocol):
    """What a dimension reads of a family."""

    @property
    def multiple(self) -> int: ...
    @property
    def layers(self) -> str: ...

    def choices(self, name: str) -> tuple[Any, ...]: ...

    def blocks(self, count: int, whole: int) -> tuple[int, ...]: ...


@runtime_checkable
class Dimension(Protocol):
    """One thing that may be chosen."""

    @property
    def name(self) -> str: ...

    def refuses(self, choices: Sequence[Any], family: Offers, anatomy: Anatomy) -> Iterator[str]:
        """Why a model cannot have these choices, a sentence each."""

    def settle(self, value: Any, family: Offers, anatomy: Anatomy, before: Subnet) -> Settled:
        """The legal value nearest to `value` (None: the whole), and what is wrong with it.

        Args:
            before: what dimensions named earlier have settled to.
        """


def listed(values: Sequence[Any]) -> str:
    """Choices, as a sentence names them."""
    return ", ".join(map(str, values))


def units(share: float, size: int, multiple: int) -> int:
    """The multiple nearest to a share of a size, the smaller of two as near, one at least; all where nothing goes."""
    wanted = share * size
    if wanted >= size:
        return size
    return min(max(min(int(-(-(wanted / multiple - 0.5) // 1)), size // multiple), 1) * multiple, size)
