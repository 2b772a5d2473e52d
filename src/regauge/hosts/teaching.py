"""What the engine asks of a model library to train a family: two protocols. Legend: B windows, T tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.elastic.family import Family
from regauge.elastic.subnet import Subnet
from regauge.learn.distillers import Read


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

    def put(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes these numbers, and forgets every gradient."""

    def read(self, subnet: Subnet, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Read:
        """What a member makes of some text; its backward pass adds to the family's gradients."""

    def backward(self) -> AbstractContextManager[None]:
        """Around backward passes."""

    def statistics(
        self, subnets: Sequence[Subnet], batches: Sequence[Tensor]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Weights]]:
        """Statistics of batch norms taken anew on some images: of the whole by the module's key, and of each member by
        canonical tensor. Nothing where there are no batch norms."""

    def original(self) -> Taught:
        """The whole as it is now, apart."""
