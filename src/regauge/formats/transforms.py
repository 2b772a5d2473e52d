"""What an activation is multiplied by before it is rounded, and its weights by the inverse.

Legend: T tokens (any leading dimensions), O output channels, I input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """The activation as it is."""

    @property
    def name(self) -> str:
        return "identity"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored of it."""
        return {}

    @property
    def bytes(self) -> int:
        """Bytes stored."""
        return 0

    def forward(self, x_TI: Tensor) -> Tensor:
        """x_TI as it is rounded."""
        return x_TI

    def inverse_on(self, w_OI: Tensor) -> Tensor:
        """The weight that undoes it: `forward(x) @ inverse_on(w).T == x @ w.T`."""
        return w_OI
