"""What is learnt: the contract between the loop and the parts that it trains.

A part that is learnt is an ordinary part of its axis (a ranger, a rounder, later a transform) whose `needs` names
`objective`. What comes out of it is ordinary too, so an artifact never knows that something was learnt.

Legend: O output channels, I input channels, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move
from regauge.formats.base import Codes, Format, Step
from regauge.formats.readings import Reading
from regauge.formats.transforms import Transform

WHOLE = 0.1
"""What the error at all bits counts beside one at fewer, where several are trained together."""
Parameters = Mapping[str, Tensor]
"""Name → what is trained, float32. A loop never changes them in place."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a block would compute with, while it is tried. Differentiable in the parameters that made it.

    Attributes:
        weights: canonical tensors, float32.
        inputs: site → what is done to its input: a reading, an online transform.
        inside: word of `anatomy.inner` → how what no matrix reads is read.
        penalty: what is added to the loss, of any shape that sums up; None for nothing.
        levels: bits → the weights that are others where the block is read at so many; its errors there count as much.
    """

    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    inside: Mapping[str, Reading] = field(default_factory=dict)
    penalty: Tensor | None = None
    levels: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def joint(self, error: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """The error of some weights; of several precisions the geometric mean, so that none of them, powers of four
        apart as they are, drowns the others. The whole counts `WHOLE`: it would let nothing else move."""
        whole = error(dict(self.weights))
        if not self.levels:
            return whole
        found = [error({**self.weights, **own}) for own in self.levels.values()]
        mean = (WHOLE * whole.log() + torch.stack(found).log().sum()) / (WHOLE + len(found))
        return mean.exp()


@dataclass(frozen=True, eq=False)
class Finished:
    """What learning leaves behind: ordinary coordinates, with nothing in them that says that they were learnt.

    Attributes:
        formats: site → its format, with the step that was learnt.
        codes: site → its codes, where they were learnt.
        transforms: tap → the transform of its channels.
        moves: of streams, in order.
        shares: tap → what is kept of its range.
        readings: tap → how it is read, with the step that was learnt.
    """

    formats: Mapping[str, Format] = field(default_factory=dict)
    codes: Mapping[str, Codes] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()
    shares: Mapping[str, Tensor] = field(default_factory=dict)
    readings: Mapping[str, Reading] = field(default_factory=dict)

    @property
    def moved(self) -> bool:
        """Whether something else now goes into the matrices of the block."""
        return bool(self.transforms or self.moves or self.shares)

    def __or__(self, other: Finished) -> Finished:
        transforms = {**self.transforms, **other.transforms}
        moves = (*self.moves, *other.moves)
        formats, codes = {**self.formats, **other.formats}, {**self.codes, **other.codes}
        shares, readings = {**self.shares, **other.shares}, {**self.readings, **other.readings}
        return Finished(formats, codes, transforms, moves, shares, readings)


Rates = Mapping[str, float | None]
"""Name of a parameter → its learning rate; None: one over the number of steps."""


@runtime_checkable
class LearntRange(Protocol):
    """A ranger that is learnt for each matrix by itself: numbers for every group."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def rates(self) -> Rates: ...

    def init(self, w_OI: Tensor, fmt: Format) -> Parameters:
        """Where training begins, for this matrix."""

    def apply(self, parameters: Parameters, w_OI: Tensor, fmt: Format) -> Format:
        """The format with its step under these parameters, differentiable; any rounder takes it as an ordinary one."""


@runtime_checkable
class LearntRounding(Protocol):
    """A rounder that is learnt for each matrix by itself: a number for every weight. `fmt` has its step."""

    @property
    def needs(self) -> frozenset[str]: ...  # statistics beside `objective`, for where training begins
    @property
    def rates(self) -> Rates: ...

    def init(self, w_OI: Tensor, fmt: Format, stats: Mapping[str, Tensor]) -> Parameters:
        """Where training begins, for this matrix."""

    def apply(self, parameters: Parameters, w_OI: Tensor, fmt: Format, progress: float) -> Tensor:
        """Ŵ (O, I), float32, differentiable; `progress` runs from 0 to 1, at which it is what `finish` decodes to."""

    def beside(self, parameters: Parameters, w_OI: Tensor, fmt: Format, progress: float) -> Mapping[int, Tensor]:
        """Bits → Ŵ where it is read at fewer, of those whose errors count too: none of most."""

    def penalty(self, parameters: Parameters, progress: float) -> Tensor | None:
        """What is added to the loss, None for nothing."""

    def finish(self, parameters: Parameters, w_OI: Tensor, fmt: Format) -> Codes:
        """The codes that were learnt, on the format's step."""


@runtime_checkable
class LearntStep(Protocol):
    """A ranger whose static step of one tap is learnt: numbers for its groups."""

    @property
    def rates(self) -> Rates: ...

    def init(self, step: Step) -> Parameters:
        """Where training begins, from the step that calibration gives."""

    def apply(self, parameters: Parameters, step: Step, fmt: Format) -> Step:
        """The step under these parameters, as it will be stored, differentiable."""


@runtime_checkable
class LearntTransform(Protocol):
    """The maker of a transform that is learnt for one tap: numbers for its channels."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def rates(self) -> Rates: ...

    def init(self, channels: int) -> Parameters:
        """Where training begins."""

    def apply(self, parameters: Parameters) -> Transform:
        """The transform under these parameters, differentiable forward and on the weights."""


@runtime_checkable
class LearntShare(Protocol):
    """A ranger of inputs that is learnt for one tap: how much of each token's range is kept."""

    @property
    def needs(self) -> frozenset[str]: ...
    @property
    def rates(self) -> Rates: ...

    def init(self) -> Parameters:
        """Where training begins."""

    def share(self, parameters: Parameters) -> Tensor:
        """What is kept of a range under these parameters, (1,), differentiable."""


@runtime_checkable
class LearntRewrite(Protocol):
    """A rewrite whose moves are trained with a block: numbers for its streams. `needs` names `trained`."""

    @property
    def needs(self) -> frozenset[str]: ...
    def rates(self, anatomy: Anatomy, block: int) -> Rates: ...
    def init(self, anatomy: Anatomy, block: int) -> Parameters:
        """Where training begins: parameters that move nothing."""

    def moves(self, parameters: Parameters, anatomy: Anatomy, weights: Weights, block: int) -> list[Move]:
        """The moves under these parameters, differentiable."""


@dataclass(frozen=True)
class Taught:
    """What is learnt of one matrix: its range, its rounding, or both together. Neither, of one that moves while others
    are trained (it reads a tap whose transform is learnt, or a learnt rewrite moves it): it is rounded to nearest."""

    ranger: LearntRange | None = None
    rounder: LearntRounding | None = None


@runtime_checkable
class Learned(Protocol):
    """What a loop trains: something that changes what a block computes with. `sites.py` makes one of a `Taught`.

    A part of scope `block` may change several weights and inputs together (an affine of what q, k and v read).
    """

    @property
    def scope(self) -> str: ...
    @property
    def rates(self) -> Rates: ...

    def init(self, trial: Trial) -> Parameters:
        """Where training begins; `trial` holds the weights as they are."""

    def apply(self, parameters: Parameters, trial: Trial, progress: float) -> Trial:
        """The trial under these parameters."""

    def finish(self, parameters: Parameters, trial: Trial) -> Finished:
        """What was learnt, as ordinary coordinates."""


@runtime_checkable
class Problem(Protocol):
    """What one loop solves. Lower error = better."""

    @property
    def rates(self) -> Rates: ...
    @property
    def batches(self) -> int: ...

    def init(self) -> Parameters: ...

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        """The loss of one batch, a scalar, differentiable."""

    def error(self, parameters: Parameters) -> float:
        """The error over every batch, as hard as it will be in the end (nothing soft, no penalty)."""


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every number of some tensors is finite; a GPU is waited for once."""
    flags = [one.isfinite().all() for one in tensors]
    return bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
