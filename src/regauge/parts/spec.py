"""A coordinate as data: a named part with its options."""

from __future__ import annotations

from dataclasses import dataclass

Option = str | int | float | bool


@dataclass(frozen=True)
class Spec:
    """A named part with its options, e.g. `gptq` with damp 0.01. Hashable.

    The option `otherwise` spells the fallback of a grain.
    """

    part: str
    options: tuple[tuple[str, Option], ...] = ()
