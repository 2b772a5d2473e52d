"""Coordinates as data: a named part with its options, and the point that one site takes on every axis."""

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


@dataclass(frozen=True)
class Choice:
    """Coordinates of one site. `full` sites stay as they are and carry no other coordinate.

    Attributes:
        grid, grain, ranger, scale: the format of the weight.
        rounder: which code each weight takes.
        compensator: what is added back, or None.
        activations: grid of the input, quantised per token at run time (`int8`, `fp8`), or None.
    """

    grid: Spec
    grain: Spec
    ranger: Spec
    scale: Spec
    rounder: Spec
    compensator: Spec | None = None
    activations: Spec | None = None
