"""What a format is: a grid (which numbers exist), a grain (which weights share a step), a ranger (how big the
step is), and a scale (how the step itself is stored).

Legend: O output channels, I input channels, G groups, K weights in a group. w ≈ scale · (z − zero), z on the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.formats.chunks import chunks
from regauge.formats.grid import Grid as Grid
from regauge.formats.lows import LOW as LOW
from regauge.formats.lows import Low as Low
from regauge.formats.numbers import ends as ends
from regauge.formats.numbers import lowest as lowest
from regauge.formats.numbers import reach as reach
from regauge.formats.numbers import said
from regauge.kernels.cpu.sweep import Range, Stored


@dataclass(frozen=True, eq=False)
class Step:
    """The step of every group, already representable as it will be stored.

    Attributes:
        scale_G1: the multiplier that decoding uses, float32, positive unless the scale keeps signs.
        zero_G1: the grid value that decodes to 0, float32; None on symmetric grids. An integer unless `low` is kept.
        fields: what is stored, by name: `scale`, `zero` or `low` (the value of code 0), a level that steps share.
            Decoding `fields` gives the two above, bit for bit.
    """

    scale_G1: Tensor
    zero_G1: Tensor | None
    fields: Mapping[str, Tensor]


@runtime_checkable
class Grain(Protocol):
    """Which weights share a step. `join(split(w), w) == w`."""

    @property
    def name(self) -> str: ...

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape (O, I) cannot be cut this way, or None."""

    def taken(self, shape: tuple[int, int]) -> Grain:
        """The grain that this shape really gets: itself, or the branch of a fallback."""

    def span(self, shape: tuple[int, int]) -> int:
        """Neighbouring input channels in a group: I where a group holds whole rows."""

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(G, K) for a matrix of shape (O, I). Groups are numbered row by row."""

    def split(self, w_OI: Tensor) -> Tensor: ...  # → w_GK
    def join(self, w_GK: Tensor, like_OI: Tensor) -> Tensor: ...
    def spread(self, step_G1: Tensor, shape: tuple[int, int]) -> Tensor:
        """The step of each element: (G, 1) → (O, I)."""


@runtime_checkable
class Scale(Protocol):
    """How a step is stored: its own dtype or grid, sometimes with a second, shared level."""

    @property
    def name(self) -> str: ...
    @property
    def shared(self) -> bool: ...  # True: steps of one matrix share a level, so all must be known before one is stored

    @property
    def fused(self) -> bool: ...  # True: the shared level is one figure, which runtimes that fuse matrices take for all

    @property
    def loose(self) -> Scale | None: ...  # where neighbours along a row share a level: what finds their steps first
    @property
    def signed(self) -> bool: ...  # True: a step may be negative
    @property
    def low(self) -> Low | None: ...  # of asymmetric grids; None: the zero point is a code
    @property
    def packed(self) -> Mapping[str, int]: ...  # fields of codes narrower than a byte → their bits

    @property
    def kernel(self) -> Stored | None: ...  # what the C++ kernels must know to store so; None: torch does, or unbound

    def bind(self, scale_G1: Tensor, grid: Grid, rows: int, low_G1: Tensor | None = None) -> Scale:
        """The scale for one matrix and grid: its shared level fixed by these steps, of `rows` rows. Idempotent."""

    def bytes(self, groups: int, rows: int = 1) -> int: ...
    def store(self, scale_G1: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Representable scale (float32, positive, finite) and the fields that hold it. Bound scales only."""

    def load(self, fields: Mapping[str, Tensor]) -> Tensor:
        """scale_G1 again from the fields."""


ALL = slice(None)
JOINED = "joined"  # what a part needs that is learnt with the whole model alone: a static step, scales of streams
OBJECTIVE = "objective"
"""What a part needs that is learnt, or chosen, by the error of a block's output against the uncompressed model's."""


@runtime_checkable
class Ranger(Protocol):
    """How big the step is. Weights and activations alike."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[str]: ...  # `OBJECTIVE` where the step is learnt (see `learn/base.py`)
    @property
    def kernel(self) -> Range | None: ...  # what the C++ kernels must know to find it; None: torch does

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step: ...


@dataclass(frozen=True)
class Format:
    """One point of grid × grain × ranger × scale.

    Attributes:
        step: of one matrix, where it is known already because it was learnt; None: the ranger finds it.
    """

    grid: Grid
    grain: Grain
    ranger: Ranger
    scale: Scale
    step: Step | None = None

    def bound(self, w_OI: Tensor, weight_GK: Tensor | None = None) -> Format:
        """The format for this matrix: a level that all its steps share is fixed by its largest magnitudes, one that
        neighbours share by the steps that the ranger would take."""
        if self.scale.loose is not None:
            x_GK = self.grain.split(w_OI)
            step = self.ranger(x_GK, self.grid, self.scale.loose, weight_GK)
            # Zeros take any step, and must not raise the level of their neighbours to that of theirs, which is 1.
            scale_G1 = torch.where(reach(x_GK) > 0, step.scale_G1, 0.0)
            low_G1 = None if step.zero_G1 is None else (self.grid.low - step.zero_G1) * scale_G1
            return replace(self, scale=self.scale.bind(scale_G1, self.grid, w_OI.shape[0], low_G1))
        if not self.scale.shared:
            return self
        step_G1 = said(reach(self.grain.split(w_OI)) / ((self.grid.high - self.grid.low) / 2), self.grid)
        return replace(self, scale=self.scale.bind(step_G1, self.grid, w_OI.shape[0]))

    def together(self, matrices: Sequence[Tensor]) -> Format:
        """The format for some matrices (O, I) that a runtime fuses: one level for all, fixed by their largest."""
        if not self.scale.fused or len(matrices) < 2:
            return self
        steps = [reach(self.grain.split(w_OI)) / ((self.grid.high - self.grid.low) / 2) for w_OI in matrices]
        return replace(self, scale=self.scale.bind(torch.cat(steps), self.grid, 1))

    def fit(self, w_OI: Tensor, weight_OI: Tensor | None = None) -> Step:
        """The step of every group of `w_OI`; `weight_OI` ≥ 0 says how much each element's error counts."""
        if self.step is not None:
            return self.step
        weight_GK = None if weight_OI is None else self.grain.split(weight_OI)
        return self.ranger(self.grain.split(w_OI), self.grid, self.bound(w_OI, weight_GK).scale, weight_GK)

    def load(self, fields: Mapping[str, Tensor]) -> Step:
        """The step again from what is stored of it."""
        scale_G1 = self.scale.load(fields)
        if self.grid.symmetric:
            return Step(scale_G1, None, fields)
        if self.scale.low is None and LOW not in fields:
            return Step(scale_G1, self.grid.decode(fields["zero"]), fields)
        kept_G1 = fields[LOW] if self.scale.low is None else self.scale.low.load(fields)
        return Step(scale_G1, lowest(kept_G1, scale_G1, self.grid), fields)

    def scaled(self, w_OI: Tensor, step: Step) -> Tensor:
        """`w_OI` in grid units: w / scale + zero, in the dtype of `w_OI`."""
        z_GK = self.grain.split(w_OI) / step.scale_G1.to(w_OI.dtype)
        if step.zero_G1 is not None:
            z_GK += step.zero_G1.to(w_OI.dtype)
        return self.grain.join(z_GK, w_OI)

    def unscaled(self, z_OI: Tensor, step: Step) -> Tensor:
        """Back from grid units: scale · (z − zero), in the dtype of `z_OI`."""
        z_GK = self.grain.split(z_OI)
        if step.zero_G1 is not None:
            z_GK = z_GK - step.zero_G1.to(z_OI.dtype)
        return self.grain.join(z_GK * step.scale_G1.to(z_OI.dtype), z_OI)

    def encode(self, w_OI: Tensor, step: Step | None = None, weight_OI: Tensor | None = None) -> Codes:
        """Each weight to its nearest code; fits the step first where none is given. Code words are nearest under
        `weight_OI`; of single weights it decides nothing. A few groups at a time, so that temporaries stay in cache.
        """
        step = self.fit(w_OI) if step is None else step
        x_GK = self.grain.split(w_OI)
        weight_GK = None if weight_OI is None else self.grain.split(weight_OI)
        codes_GK = torch.empty(x_GK.shape, dtype=torch.uint8, device=w_OI.device)
        for part in chunks(x_GK):
            z_GK = x_GK[part].float() / step.scale_G1[part]
            if step.zero_G1 is not None:
                z_GK += step.zero_G1[part]
            near_GK = self.grid.near(z_GK, None if weight_GK is None else weight_GK[part])
            codes_GK[part] = self.grid.encode(near_GK)
        return Codes(self.grain.join(codes_GK, w_OI), step)

    def decode(self, codes: Codes) -> Tensor:
        """w_OI, float32: of the codes alone, without the terms beside them."""
        codes_GK = self.grain.split(codes.codes_OI)
        w_GK = torch.empty(codes_GK.shape, dtype=torch.float32, device=codes_GK.device)
        for part in chunks(codes_GK):
            z_GK = self.grid.decode(codes_GK[part])
            if codes.step.zero_G1 is not None:
                z_GK -= codes.step.zero_G1[part]
            torch.mul(z_GK, codes.step.scale_G1[part], out=w_GK[part])
        return self.grain.join(w_GK, codes.codes_OI)

    def zero_bytes(self, groups: int, rows: int = 1) -> int:
        """Bytes of the packed zero points: one code of the grid's bits a group, or as the scale keeps them."""
        if self.grid.symmetric or self.scale.low is None:
            return 0 if self.grid.symmetric else (groups * self.grid.bits + 7) // 8
        return self.scale.low.bytes(groups, rows)

    def bytes(self, shape: tuple[int, int]) -> int:
        """Bytes stored for a matrix of shape (O, I): packed rows, steps and zero points."""
        groups, _ = self.grain.groups(shape)
        packed = shape[0] * self.grid.row_bytes(shape[1])
        return packed + self.scale.bytes(groups, shape[0]) + self.zero_bytes(groups, shape[0])


@runtime_checkable
class Term(Protocol):
    """One summand of a matrix as it is stored. See `formats/terms.py` for those that there are."""

    @property
    def kind(self) -> str: ...  # a name of `terms.KINDS`, by which it is read again
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...  # what is stored of it, by name
    @property
    def shape(self) -> tuple[int, int]: ...  # (O, I) of the matrix
    @property
    def bytes(self) -> int: ...
    def apply(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """y + x Wᵀ, W this term's part of the matrix."""

    def dense(self, index: slice | Tensor = ALL) -> Tensor:
        """Its part of the matrix, or of some rows of it."""


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantised matrix: one code an element, unpacked, and the steps.

    Attributes:
        codes_OI: uint8 codes in the original column order.
        step: as fitted.
        terms: what is added to the codes: the matrix is the sum of them all.
        notes: what the rounder had to do that the user did not ask for, in a sentence each; for the receipt.
    """

    codes_OI: Tensor
    step: Step
    terms: tuple[Term, ...] = ()
    notes: tuple[str, ...] = ()
