"""What a format is: a grid (which numbers exist), a grain (which weights share a step), a ranger (how big the
step is), and a scale (how the step itself is stored).

Legend: O output channels, I input channels, G groups, K weights in a group. w ≈ scale · (z − zero), z on the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """The step of every group, already representable as it will be stored.

    Attributes:
        scale_G1: the multiplier that decoding uses, float32, positive.
        zero_G1: the grid value that decodes to 0, float32 integer; None on symmetric grids.
        fields: what is stored, by name: `scale`, `zero`, `global_scale`. Decoding `fields` gives the two above, bit
            for bit.
    """

    scale_G1: Tensor
    zero_G1: Tensor | None
    fields: Mapping[str, Tensor]


class Grid(Protocol):
    """Which numbers exist. Idempotent and monotone."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...  # stored bits an element
    @property
    def symmetric(self) -> bool: ...  # True: no zero point is stored
    @property
    def low(self) -> float: ...  # least grid value
    @property
    def high(self) -> float: ...  # greatest grid value

    def snap(self, z: Tensor) -> Tensor:
        """The nearest grid value, same shape and dtype; saturates outside [low, high]."""

    def encode(self, z: Tensor) -> Tensor:
        """Codes 0 … 2^bits − 1, uint8, of values that are on the grid."""

    def decode(self, codes: Tensor) -> Tensor:
        """Grid values, float32, of codes."""


class Grain(Protocol):
    """Which weights share a step. `join(split(w), w) == w`."""

    @property
    def name(self) -> str: ...

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape (O, I) cannot be cut this way, or None."""

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(G, K) for a matrix of shape (O, I)."""

    def split(self, w_OI: Tensor) -> Tensor: ...  # → w_GK
    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor: ...
    def spread(self, step_G1: Tensor, shape: tuple[int, int]) -> Tensor:
        """The step of each element: (G, 1) → (O, I)."""


class Scale(Protocol):
    """How a step is stored: its own dtype or grid, sometimes with a second, global level."""

    @property
    def name(self) -> str: ...

    def bytes(self, groups: int) -> int: ...
    def store(self, scale_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Representable scale (float32, positive, finite) and the fields that hold it."""

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        """scale_G1 again from the fields."""


class Ranger(Protocol):
    """How big the step is. Weights and activations alike."""

    @property
    def name(self) -> str: ...

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step: ...


@dataclass(frozen=True)
class Format:
    """One point of grid × grain × ranger × scale."""

    grid: Grid
    grain: Grain
    ranger: Ranger
    scale: Scale

    def fit(self, w_OI: Tensor, weight_OI: Tensor | None = None) -> Step:
        """The step of every group of `w_OI`; `weight_OI` ≥ 0 says how much each element's error counts."""
        weight_GK = None if weight_OI is None else self.grain.split(weight_OI)
        return self.ranger(self.grain.split(w_OI.float()), self.grid, self.scale, weight_GK)

    def scaled(self, w_OI: Tensor, step: Step) -> Tensor:
        """`w_OI` in grid units: w / scale + zero."""
        shape = (w_OI.shape[0], w_OI.shape[1])
        z_OI = w_OI / self.grain.spread(step.scale_G1, shape).to(w_OI.dtype)
        return z_OI if step.zero_G1 is None else z_OI + self.grain.spread(step.zero_G1, shape).to(w_OI.dtype)

    def unscaled(self, z_OI: Tensor, step: Step) -> Tensor:
        """Back from grid units: scale · (z − zero)."""
        shape = (z_OI.shape[0], z_OI.shape[1])
        if step.zero_G1 is not None:
            z_OI = z_OI - self.grain.spread(step.zero_G1, shape).to(z_OI.dtype)
        return z_OI * self.grain.spread(step.scale_G1, shape).to(z_OI.dtype)

    def encode(self, w_OI: Tensor, step: Step | None = None) -> Codes:
        """Each weight to its nearest code; fits the step first where none is given."""
        step = self.fit(w_OI) if step is None else step
        z_OI = self.grid.snap(self.scaled(w_OI.float(), step))
        return Codes(self.grid.encode(z_OI), step)

    def decode(self, codes: Codes) -> Tensor:
        """w_OI, float32."""
        return self.unscaled(self.grid.decode(codes.codes_OI), codes.step)

    def zero_bytes(self, groups: int) -> int:
        """Bytes of the packed zero points: one code of the grid's bits a group."""
        return 0 if self.grid.symmetric else (groups * self.grid.bits + 7) // 8

    def bytes(self, shape: tuple[int, int]) -> int:
        """Bytes stored for a matrix of shape (O, I): packed rows, steps and zero points."""
        rows, columns = shape
        groups, _ = self.grain.groups(shape)
        packed = rows * ((columns * self.grid.bits + 7) // 8)
        return packed + self.scale.bytes(groups) + self.zero_bytes(groups)


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantised matrix: one code an element, unpacked, and the steps.

    Attributes:
        codes_OI: uint8 codes in the original column order.
        step: as fitted.
        extra: named tensors that a compensator adds (low-rank factors, a bias).
    """

    codes_OI: Tensor
    step: Step
    extra: Mapping[str, Tensor] = field(default_factory=dict)
