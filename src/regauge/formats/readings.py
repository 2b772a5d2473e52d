"""How a tap is read by all its sites: a transform of its channels, then a format. The same object in calibration, in
packed modules and in the decode step.

A step is *dynamic* (from each call's own values) or *static* (known before: an artifact keeps it). In both cases the
format is the one quantiser of weights and caches: tokens are its rows, channels its columns.

Legend: T tokens (any leading dimensions), I channels, G groups of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from regauge.formats.base import OBJECTIVE, Format, Step
from regauge.formats.reaches import SHARE, Clipped
from regauge.formats.transforms import Maker, Same, Transform, shaped

STEP = ("scale", "zero")
FIELDS = (*STEP, SHARE)
"""What is kept of a static step, or of a clip; other names are a transform's."""
TURNING: ContextVar[Callable[[bool], None] | None] = ContextVar("regauge_turning", default=None)
"""Who is told, in this context, that an input begins to go through a transform (true) and has gone (false)."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """Values on the grid: x ≈ scale · (z − zero), in groups of the format's grain.

    Attributes:
        z_TI: grid values, float32.
        step: of the groups of these tokens.
    """

    z_TI: Tensor
    step: Step
    format: Format

    def decode(self) -> Tensor:
        """(T, I), float32."""
        return self.format.unscaled(self.z_TI, self.step)


@dataclass(frozen=True, eq=False)
class Reading:
    """A transform and a format of one tap.

    Attributes:
        step: of one token, where it is known beforehand; None: from each call's own values.
        soft: while a static step is trained: gradients pass, into the step too.
        share_1: of each token's range that is kept, as the format's ranger has it; None: all.
    """

    format: Format
    transform: Transform = Same()  # noqa: RUF009  # frozen, and holds nothing
    step: Step | None = None
    soft: bool = False
    share_1: Tensor | None = None

    @property
    def name(self) -> str:
        """For error messages and benchmarks: `int8`, `hadamard int8`, `static int8`."""
        words = [self.transform.name] if self.transform.changes else []
        words += ["clipped"] if self.share_1 is not None else []
        return " ".join([*words, *(["static"] if self.step is not None else []), self.format.grid.name])

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """What an artifact keeps of it, by name."""
        kept = {} if self.step is None else {name: self.step.fields[name] for name in STEP if name in self.step.fields}
        clip = {} if self.share_1 is None else {SHARE: self.share_1}
        return {**kept, **clip, **self.transform.tensors}

    @cached_property
    def one_step(self) -> bool:
        """Whether all channels of a token share a step, as a product of integers wants it."""
        return self.format.grain.groups((2, 1))[0] <= 2 and self.format.grain.span((2, 4)) == 4

    @cached_property
    def bits(self) -> int | None:
        """Of the integers that stand for the values, where they are whole multiples of one step a token; else None."""
        grid = self.format.grid
        return grid.bits if grid.kind == "integer" and grid.symmetric and self.one_step else None

    def closed(self, columns: int) -> bool:
        """Whether the first channels are read alone as they are read among all: nothing mixes channels, and none has a
        step or a multiplier of its own."""
        alone = self.step is None or self.step.scale_G1.numel() == 1
        return alone and not self.transform.changes and self.format.grain.refuses((1, columns)) is None

    def prepared(self, x: Tensor) -> Tensor:
        """x after the transform, not rounded yet: float32, or as it is where there is no transform."""
        if not self.transform.changes:
            return x
        told = None if torch.compiler.is_compiling() else TURNING.get()
        if told is None:
            return self.transform.forward(x.float())
        told(True)
        try:
            return self.transform.forward(x.float())
        finally:
            told(False)

    @property
    def clips(self) -> bool:
        """Whether values may lie outside the range: its step is not of all that each call has."""
        return self.step is not None or self.share_1 is not None

    def pulled(self, dy: Tensor, x: Tensor | None = None) -> Tensor:
        """dy Aᵀ, A the transform: the gradient of what came, of that of what it became. Rounding is passed straight
        through, and nothing by a value outside the range, which comes back as its end.

        Args:
            x: what came, where the reading clips.
        """
        if x is not None and self.clips:
            dy = dy * self._inside(x)
        if not self.transform.changes:
            return dy
        with torch.enable_grad():
            x = torch.zeros_like(dy, dtype=torch.float32).requires_grad_()
            (dx,) = torch.autograd.grad(self.transform.forward(x), x, dy.float())
        return dx.to(dy.dtype)

    def codes(self, x_TI: Tensor) -> Rounded:
        """Each value to its nearest grid value, after the transform; works in float32 whatever the dtype."""
        return self.rounded(self.prepared(x_TI).float())

    def rounded(self, x_TI: Tensor) -> Rounded:
        """`codes` of float32 values that went through the transform."""
        step = self.format.fit(x_TI) if self.step is None else self._repeated(self.step, x_TI)
        return Rounded(self.format.grid.snap(self.format.scaled(x_TI, step)), step, self.format)

    def simulate(self, x: Tensor) -> Tensor:
        """`x` transformed, as it comes back from its codes; same shape (..., I) and dtype."""
        if self.soft:
            return self.passed(x)
        x_TI = x.reshape(-1, x.shape[-1])
        return self.codes(x_TI).decode().to(x.dtype).view(x.shape) if len(x_TI) else x

    def passed(self, x: Tensor) -> Tensor:
        """`simulate`, to the bit, differentiable: through the transform, through rounding as if there were none, and
        through a step of each call's own values, so that what makes a range shorter is seen to (arXiv 1902.08153)."""
        x_TI = x.reshape(-1, x.shape[-1])
        if not len(x_TI):
            return x
        y_TI = self.prepared(x_TI).float()
        step = self.format.fit(y_TI) if self.step is None else self._repeated(self.step, y_TI)
        grid, z_TI = self.format.grid, self.format.scaled(y_TI, step)
        inside_TI = z_TI.clamp(grid.low, grid.high)
        z_TI = grid.snap(z_TI.detach()) + (inside_TI - inside_TI.detach())
        return self.format.unscaled(z_TI, step).to(x.dtype).view(x.shape)

    def _inside(self, x: Tensor) -> Tensor:
        """Which values, once transformed, the range holds."""
        y_TI, grid = self.prepared(x.reshape(-1, x.shape[-1])).float(), self.format.grid
        z_TI = self.format.scaled(y_TI, self.format.fit(y_TI) if self.step is None else self._repeated(self.step, y_TI))
        return ((z_TI >= grid.low) & (z_TI <= grid.high)).view(x.shape)

    def _repeated(self, step: Step, x_TI: Tensor) -> Step:
        """The step of one token as the step of each group of these tokens."""
        times = self.format.grain.groups((x_TI.shape[0], x_TI.shape[1]))[0] // step.scale_G1.shape[0]
        scale_G1 = step.scale_G1.to(x_TI.device).repeat(times, 1)
        return Step(scale_G1, None if step.zero_G1 is None else step.zero_G1.to(x_TI.device).repeat(times, 1), {})


def dynamic(fmt: Format, transform: Transform | None = None) -> Reading:
    """A reading whose step comes from each call's own values."""
    return Reading(fmt, transform or Same())


def clipped(fmt: Format, transform: Transform, share_1: Tensor) -> Reading:
    """A reading that keeps a share of each call's own range."""
    return Reading(replace(fmt, ranger=Clipped(share_1)), transform, share_1=share_1)


def static_step(fmt: Format, least_I: Tensor, greatest_I: Tensor) -> Step:
    """The step of one token whose channels range from `least_I` to `greatest_I`: a group's from the ends of its own."""
    low_GK, high_GK = (fmt.grain.split(end_I.float().view(1, -1)) for end_I in (least_I, greatest_I))
    return fmt.ranger(torch.cat([low_GK, high_GK], dim=1), fmt.grid, fmt.scale)


def fit(fmt: Format, transform: Transform, stats: Mapping[str, Tensor], share_1: Tensor | None = None) -> Reading:
    """The reading of a tap.

    Args:
        stats: of the *transformed* tap, `minimum` and `maximum` (I,) where the step is static.
        share_1: of the range, where that is learnt.
    """
    if share_1 is not None:
        return clipped(fmt, transform, share_1)
    if not fmt.ranger.needs:
        return Reading(fmt, transform)
    return Reading(fmt, transform, static_step(fmt, stats["minimum"], stats["maximum"]))


def load(fmt: Format, maker: Maker, channels: int, tensors: Mapping[str, Tensor]) -> Reading:
    """The reading again from what an artifact keeps of it.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to nothing.
    """
    transform = maker.load(channels, {name: tensor for name, tensor in tensors.items() if name not in FIELDS})
    step = None
    if OBJECTIVE in fmt.ranger.needs:
        share_1 = shaped(tensors, SHARE, (1,)).float()
        if not 0 < float(share_1) <= 1:
            raise ValueError(f"a share of a range is above 0 and at most 1, and {float(share_1)} was found")
        return _whole(clipped(fmt, transform, share_1), tensors)
    if fmt.ranger.needs:
        groups = fmt.grain.groups((1, channels))[0]
        for name in STEP if not fmt.grid.symmetric else STEP[:1]:
            if name not in tensors or tuple(tensors[name].shape) != (groups, 1):
                seen = list(tensors[name].shape) if name in tensors else "nothing"
                raise ValueError(f"the {name} of a static step is {[groups, 1]}, and {seen} was found")
        step = fmt.load({name: tensors[name] for name in STEP if name in tensors})
        if not bool((step.scale_G1 > 0).all() and step.scale_G1.isfinite().all()):
            raise ValueError("a static step is positive and finite, and another was found")
    return _whole(Reading(fmt, transform, step), tensors)


def _whole(reading: Reading, tensors: Mapping[str, Tensor]) -> Reading:
    if extra := tensors.keys() - reading.tensors.keys():
        raise ValueError(f"{min(extra)!r} belongs to nothing")
    return reading
