"""Contracts of the axes of `attention`.

A **share** says which blocks take the probabilities of an earlier block, and a **window** how many of the last tokens
each head sees. Both are settled once, by what calibration text shows of the attention maps of the original model or
without any, and stand in an artifact as `of` and `local`.

Legend: B sequences, H query heads, K KV heads, Q queries, T keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

LIKENESS, DISTANCE = "likeness", "distance"
"""What text may be read for: how alike the maps of blocks are, and how far back heads look."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration text showed of some blocks' attention maps.

    Attributes:
        alike: (block, earlier block) → mean overlap of their probabilities, 0 to 1; see `maps.overlap`.
        distances_K: block → for each KV head how far back it looks, in tokens; see `maps.distances`.
        kv_heads: block → how many KV heads it has.
        tokens: how many tokens were read.
    """

    alike: Mapping[tuple[int, int], float] = field(default_factory=dict)
    distances_K: Mapping[int, Tensor] = field(default_factory=dict)
    kv_heads: Mapping[int, int] = field(default_factory=dict)
    tokens: int = 0


@runtime_checkable
class Share(Protocol):
    """Which blocks take another's probabilities."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be read off the original model."""

    def __call__(self, blocks: Sequence[int], total: int, seen: Seen) -> dict[int, int]:
        """Block → the earlier block whose probabilities it takes, of those among `blocks` that take any.

        Args:
            total: blocks of the model.

        Raises:
            RecipeError: there are too few blocks.
        """


@dataclass(frozen=True)
class Local:
    """Some KV heads, with the query heads that read them, see only the newest tokens, and the first of the text.

    Attributes:
        heads: numbers of KV heads, `0+2+5`; "all".
        tokens: how many of the last tokens they see, the query's own among them, as transformers counts.
        sinks: how many of the first tokens they see besides.
    """

    heads: str = "all"
    tokens: int = 64
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.sinks < 0:
            raise ValueError(f"a head sees one token or more, and sinks are 0 or more, not {self.tokens}, {self.sinks}")
        if self.heads != "all" and not all(word.isdecimal() for word in self.heads.split("+")):
            raise ValueError(f"heads are numbers such as 0+2+5, or all, not {self.heads!r}")

    needs = frozenset[str]()

    def numbers(self, kv_heads: int) -> tuple[int, ...]:
        """The KV heads that are meant, of so many.

        Raises:
            ValueError: there is no such head.
        """
        if self.heads == "all":
            return tuple(range(kv_heads))
        found = tuple(int(word) for word in self.heads.split("+"))
        if max(found) >= kv_heads or len(set(found)) < len(found):
            raise ValueError(f"heads {self.heads} are not all different heads of {kv_heads}")
        return found

    def __call__(self, blocks: Sequence[int], seen: Seen) -> dict[int, Local]:
        return dict.fromkeys(blocks, self)


@runtime_checkable
class Window(Protocol):
    """What each head sees."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be read off the original model."""

    def __call__(self, blocks: Sequence[int], seen: Seen) -> dict[int, Local]:
        """Block → which of its heads see how little, of those blocks where some do."""
