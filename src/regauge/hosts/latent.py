"""What a host is told of latent attention that it writes a model anew with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class LatentSizes(Protocol):
    """How a latent is laid out; see `rewrites.latent`."""

    @property
    def keep(self) -> float: ...
    @property
    def rotary(self) -> float: ...
    @property
    def reach(self) -> int: ...
    @property
    def published(self) -> bool: ...
