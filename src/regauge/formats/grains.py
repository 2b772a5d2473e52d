"""Which weights share a step.

Legend: O output channels, I input channels, G groups, K weights in a group. Groups are numbered row by row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regauge.formats.base import Grain

Shape = tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """One step a row. Rows are output channels of a weight (`channel`) or tokens of an activation (`token`)."""

    name: str

    def refuses(self, shape: Shape) -> str | None:
        return None

    def taken(self, shape: Shape) -> Grain:
        return self

    def span(self, shape: Shape) -> int:
        return shape[1]

    def groups(self, shape: Shape) -> Shape:
        return shape

    def split(self, w_OI: Tensor) -> Tensor:
        return w_OI

    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor:
        return w_GK

    def spread(self, step_G1: Tensor, shape: Shape) -> Tensor:
        return step_G1.expand(shape)


def Channel() -> Rows:
    """One step an output channel."""
    return Rows("channel")


def Token() -> Rows:
    """One step a token: activations, a row each."""
    return Rows("token")


@dataclass(frozen=True)
class Whole:
    """One step for the whole matrix."""

    @property
    def name(self) -> str:
        return "tensor"

    def refuses(self, shape: Shape) -> str | None:
        return None

    def taken(self, shape: Shape) -> Grain:
        return self

    def span(self, shape: Shape) -> int:
        return shape[1]

    def groups(self, shape: Shape) -> Shape:
        return (1, shape[0] * shape[1])

    def split(self, w_OI: Tensor) -> Tensor:
        return w_OI.reshape(1, -1)

    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor:
        return w_GK.reshape(like_OI.shape)

    def spread(self, step_G1: Tensor, shape: Shape) -> Tensor:
        return step_G1.expand(shape)


@dataclass(frozen=True)
class Group:
    """One step for every `size` neighbours along the input."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group has at least one weight, not {self.size}")

    @property
    def name(self) -> str:
        return f"group:{self.size}"

    def refuses(self, shape: Shape) -> str | None:
        return None if shape[1] % self.size == 0 else f"groups of {self.size} do not divide a width of {shape[1]}"

    def taken(self, shape: Shape) -> Grain:
        return self

    def span(self, shape: Shape) -> int:
        return self.size

    def groups(self, shape: Shape) -> Shape:
        return (shape[0] * (shape[1] // self.size), self.size)

    def split(self, w_OI: Tensor) -> Tensor:
        if reason := self.refuses((w_OI.shape[0], w_OI.shape[1])):
            raise ValueError(reason)
        return w_OI.reshape(-1, self.size)

    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor:
        return w_GK.reshape(like_OI.shape)

    def spread(self, step_G1: Tensor, shape: Shape) -> Tensor:
        return step_G1.expand(-1, self.size).reshape(shape)


@dataclass(frozen=True)
class Time:
    """One step a channel for every `size` tokens in a row: keys of a cache, whose outliers sit in channels (KIVI, arXiv
    2402.02750). Rows are tokens, columns channels."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group has at least one token, not {self.size}")

    @property
    def name(self) -> str:
        return f"time:{self.size}"

    def refuses(self, shape: Shape) -> str | None:
        return None if shape[0] % self.size == 0 else f"groups of {self.size} tokens do not divide {shape[0]} tokens"

    def taken(self, shape: Shape) -> Grain:
        return self

    def span(self, shape: Shape) -> int:
        return 1

    def groups(self, shape: Shape) -> Shape:
        return ((shape[0] // self.size) * shape[1], self.size)

    def split(self, w_OI: Tensor) -> Tensor:
        if reason := self.refuses((w_OI.shape[0], w_OI.shape[1])):
            raise ValueError(reason)
        return w_OI.reshape(-1, self.size, w_OI.shape[1]).transpose(1, 2).reshape(-1, self.size)

    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor:
        return w_GK.reshape(-1, like_OI.shape[1], self.size).transpose(1, 2).reshape(like_OI.shape)

    def spread(self, step_G1: Tensor, shape: Shape) -> Tensor:
        return step_G1.reshape(-1, 1, shape[1]).expand(-1, self.size, -1).reshape(shape)


@dataclass(frozen=True)
class Block:
    """One step for every block of `rows` × `columns`."""

    rows: int = 128
    columns: int = 128

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"a block has at least one weight, not {self.rows} x {self.columns}")

    @property
    def name(self) -> str:
        return f"block:{self.rows}x{self.columns}"

    def refuses(self, shape: Shape) -> str | None:
        if shape[0] % self.rows == 0 and shape[1] % self.columns == 0:
            return None
        return f"blocks of {self.rows} x {self.columns} do not divide {shape[0]} x {shape[1]}"

    def taken(self, shape: Shape) -> Grain:
        return self

    def span(self, shape: Shape) -> int:
        return self.columns

    def groups(self, shape: Shape) -> Shape:
        return ((shape[0] // self.rows) * (shape[1] // self.columns), self.rows * self.columns)

    def split(self, w_OI: Tensor) -> Tensor:
        if reason := self.refuses((w_OI.shape[0], w_OI.shape[1])):
            raise ValueError(reason)
        down, across = w_OI.shape[0] // self.rows, w_OI.shape[1] // self.columns
        return w_OI.reshape(down, self.rows, across, self.columns).transpose(1, 2).reshape(down * across, -1)

    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor:
        down, across = like_OI.shape[0] // self.rows, like_OI.shape[1] // self.columns
        return w_GK.reshape(down, across, self.rows, self.columns).transpose(1, 2).reshape(like_OI.shape)

    def spread(self, step_G1: Tensor, shape: Shape) -> Tensor:
        step = step_G1.reshape(shape[0] // self.rows, 1, shape[1] // self.columns, 1)
        return step.expand(-1, self.rows, -1, self.columns).reshape(shape)


@dataclass(frozen=True)
class Fallback:
    """`first` where it divides the matrix, else `second`: `group:128 else channel`. `taken` says which."""

    first: Grain
    second: Grain

    @property
    def name(self) -> str:
        return f"{self.first.name} else {self.second.name}"

    def refuses(self, shape: Shape) -> str | None:
        first, second = self.first.refuses(shape), self.second.refuses(shape)
        return None if first is None or second is None else f"{first}; {second}"

    def taken(self, shape: Shape) -> Grain:
        return (self.first if self.first.refuses(shape) is None else self.second).taken(shape)

    def span(self, shape: Shape) -> int:
        return self.taken(shape).span(shape)

    def groups(self, shape: Shape) -> Shape:
        return self.taken(shape).groups(shape)

    def split(self, w_OI: Tensor) -> Tensor:
        return self.taken((w_OI.shape[0], w_OI.shape[1])).split(w_OI)

    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor:
        return self.taken((like_OI.shape[0], like_OI.shape[1])).join(w_GK, like_OI)

    def spread(self, step_G1: Tensor, shape: Shape) -> Tensor:
        return self.taken(shape).spread(step_G1, shape)
