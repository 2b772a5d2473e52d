"""Contracts of the five shape axes, and which streams must keep the same number of units.

A **unit** is what is taken out as one. A **score** says which units matter, **higher = keep**. An **allocation** says
how many stay in each stream, a **schedule** over how many steps they go, and a **repair** what is done to the weights
that read those that stay. Parts see one stream, its block's tensors and the statistics of what its reader reads; they
never run a model. Legend: N units of a stream, K of them kept, O output channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from regauge.anatomy.model import Anatomy, Site, Stream, Weights
from regauge.errors import RecipeError

Stats = Mapping[str, Tensor]
"""Statistics of the reader's input by name, see `rounding/base.py`."""


@runtime_checkable
class Unit(Protocol):
    """What is taken out as one."""

    def refuses(self, stream: Stream) -> str | None:
        """Why a stream has no such units, in a sentence; None where it has."""


@runtime_checkable
class Score(Protocol):
    """Which units matter. Higher = keep."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the reader's input."""

    def __call__(self, stream: Stream, weights: Weights, stats: Stats) -> Tensor:
        """score_N, float64."""


@runtime_checkable
class Allocation(Protocol):
    """How many units stay in each stream."""

    @property
    def scored(self) -> bool:
        """Whether it wants every stream's scores first, which costs a pass over the whole model."""

    def __call__(self, groups: Sequence[Group], scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Stream → how many stay. `scores` is empty unless `scored`."""


@runtime_checkable
class Schedule(Protocol):
    """In how many steps they go."""

    def __call__(self, units: int, kept: int) -> tuple[int, ...]:
        """How many are left after each step; the last is `kept`."""


@runtime_checkable
class Repair(Protocol):
    """What is done to the weights that read the units that stay."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the reader's input, all N units."""

    def __call__(self, w_ON: Tensor, kept_K: Tensor, stats: Stats) -> Tensor:
        """w_OK, what stands in the place of `w_ON[:, kept_K]`."""


@dataclass(frozen=True)
class Group:
    """Streams that keep the same number of units: the experts of one stack, or a stream by itself."""

    names: tuple[str, ...]
    units: int


def groups(anatomy: Anatomy, streams: Iterable[Stream]) -> list[Group]:
    """The streams given, those together that lie in one stack.

    Raises:
        RecipeError: some experts of a stack are among them and others not.
    """
    found: dict[str, list[Stream]] = {}
    for stream in streams:
        site = reader(anatomy, stream)
        key = stream.name if site.weight.index is None else site.weight.key
        found.setdefault(key, []).append(stream)
    for key, some in found.items():
        given = {stream.name for stream in some}
        stack = [one.name for one in anatomy.streams if one.kind == "ffn" and reader(anatomy, one).weight.key == key]
        left = [name for name in stack if name not in given]
        if left:
            raise RecipeError(
                f"shape names {some[0].name} and not {left[0]}, which lies in the same stack: experts of one stack "
                "keep one width, so name them all"
            )
    return [Group(tuple(one.name for one in some), some[0].size) for some in found.values()]


def reader(anatomy: Anatomy, stream: Stream) -> Site:
    """The site that reads a stream of neurons (there is one)."""
    return anatomy.site(stream.readers[0].tensor.removesuffix(".weight"))


def statistic(stats: Stats, name: str, who: str) -> Tensor:
    """One statistic, or an error that says who wanted it."""
    if name not in stats:
        raise RecipeError(f"{who} needs the statistic {name!r}, which was not collected; give calibration text")
    return stats[name]
