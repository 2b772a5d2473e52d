"""What is asked of models that were loaded, and what a config says of a part of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Sized:
    """What config.json must say of a member otherwise than of the whole.

    Attributes:
        fewer: how many blocks there are, and of which kinds.
        sized: that and all sizes; empty where one number for all blocks cannot say them.
        unsaid: why it cannot; "" where it can.
    """

    fewer: Mapping[str, Any]
    sized: Mapping[str, Any]
    unsaid: str


@runtime_checkable
class Ways(Protocol):
    """The ways in which one model can be run on one set of weights."""

    @property
    def runtime(self) -> Any: ...  # as an artifact is run
    @property
    def own(self) -> Callable[..., Any] | None: ...  # by the library's own modules; None for an artifact
    @property
    def native(self) -> bool: ...  # whether the native step has served a token so far
