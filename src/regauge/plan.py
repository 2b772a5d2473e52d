"""Plans: ordered rules (selector → coordinates) as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Option = str | int | float | bool


@dataclass(frozen=True)
class Spec:
    """A named part with its options, e.g. `gptq` with damp 0.01. Hashable."""

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


@dataclass(frozen=True)
class Rule:
    """Sites whose canonical name matches `select` take `choice` (None: full precision). The last match wins."""

    select: str
    choice: Choice | None


@dataclass(frozen=True)
class Plan:
    """A recipe: rewrites in order, then rules."""

    name: str
    rules: tuple[Rule, ...]
    rewrites: tuple[Spec, ...] = ()
    title: str = ""
    cite: tuple[str, ...] = ()
    differs: str = ""
    calibration: Mapping[str, int] = field(default_factory=dict)  # tokens, length: defaults of the method
