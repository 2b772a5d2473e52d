"""What the engine asks of a model library to train a family. Legend: B windows, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.errors import ModelError
from regauge.learn.distillers import Read


@dataclass(frozen=True)
class Beside:
    """What is trained beside codes that stay.

    Attributes:
        rank: of the low-rank terms.
        shared: whether one term serves all precisions, which is the null of a term for each.
    """

    rank: int
    shared: bool = False
    seed: int = 0


@runtime_checkable
class Taught(Protocol):
    """A model that teaches."""

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        """What it makes of some text, without a gradient."""


@runtime_checkable
class Trainee(Protocol):
    """A family in float32 while it is trained: every member over one memory, whose gradients add up in it."""

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...  # what members compute with, by the module's key
    @property
    def gradients(self) -> Mapping[str, Tensor]: ...  # what backward passes have added up
    @property
    def family(self) -> Family: ...
    @property
    def anatomy(self) -> Anatomy: ...
    @property
    def where(self) -> torch.device: ...  # its numbers lie, and what it reads has to lie
    @property
    def bits(self) -> tuple[int, ...]: ...  # precisions whose adapters are trained, beside codes that stay; else none

    def put(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes these numbers, and forgets every gradient."""

    def read(self, subnet: Subnet, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        """What a member makes of some text; its backward pass adds to the family's gradients."""

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """(B, T, D), without a gradient: what tells a router of a text."""

    def narrowed(self, ids_BT: Tensor, shares: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """For each block what its feed-forward layer reads (T, D), and by how much what each share of its neurons gives
        misses what the whole gives (T, K): a squared distance, 1 for the mean square of what the whole gives."""

    def gated(self, gates: Mapping[int, Tensor], ids_BT: Tensor) -> tuple[Read, Tensor]:
        """What the family makes of some text where gates choose neurons for each token, without a gradient; and how
        many tokens of each block ran through each share (blocks, K)."""

    def backward(self) -> AbstractContextManager[None]:
        """Around backward passes."""

    def original(self) -> Taught:
        """Who teaches: the whole as it is now, apart, or what a family in codes was made of."""

    def stored(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of it an artifact keeps beside its tensors, by name."""


class Numbers:
    """The numbers of a trainee, over which its members lie."""

    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @property
    def where(self) -> torch.device:
        """Where they lie."""
        return next(iter(self.parameters.values())).device

    def put(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes these numbers, and forgets every gradient."""
        for key, value in parameters.items():
            self.parameters[key].copy_(value)
            self.gradients[key].zero_()


class Ungated:
    """A trainee whose tokens choose no neurons, and why."""

    why: ClassVar[str]

    def narrowed(self, ids_BT: Tensor, shares: Sequence[float]) -> NoReturn:
        """
        Raises:
            ModelError: always.
        """
        raise ModelError(self.why)

    def gated(self, gates: Mapping[int, Tensor], ids_BT: Tensor) -> NoReturn:
        """
        Raises:
            ModelError: always.
        """
        raise ModelError(self.why)
