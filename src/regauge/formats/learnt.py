"""Ranges that are learnt: how far the ends of each group are clipped, trained by `learn/loop.py` on a block's error.

Legend: O output channels, I input channels, G groups, K weights in a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from regauge.formats.base import OBJECTIVE, Format, Grid, Scale, Step, ends, lowest
from regauge.formats.numbers import said
from regauge.kernels.cpu.sweep import Range

BOTTOM, TOP = "bottom", "top"


class Trained:
    """What rangers have in common that are trained by the error of a block: a learning rate, and no kernel."""

    rate: float | None
    needs: ClassVar[frozenset[str]] = frozenset({OBJECTIVE})
    kernel: ClassVar[Range | None] = None

    def __post_init__(self) -> None:
        checked_rate(self.rate)


@dataclass(frozen=True)
class LearntClip(Trained):
    """Learnable weight clipping (OmniQuant, arXiv 2308.13137, equation 2; its `--lwc`).

    The range of a group is [sigmoid(β) · min, sigmoid(γ) · max]; γ and β are trained by the error of the block's output
    against the uncompressed model's, rounding passed straight through, and the step that comes out is an ordinary one.
    Both begin at 4, as published: sigmoid(4) = 0.982, so before any training the step is that of a range 1.8% shorter
    than `minmax`'s. It works on every grid; on a symmetric one the step is the least that reaches both ends.

    Differs: the zero point is rounded with the gradient passed on, the released code cuts it there; the parameters with
    the least error over all calibration text are kept, not the last; steps are trained as they will be stored.
    Cost: in each training step about a dozen passes over the weights, beside running the block forward and backward.

    Attributes:
        rate: learning rate.
        start: γ and β before training.
    """

    rate: float = 0.01
    start: float = 4.0

    @property
    def name(self) -> str:
        return "learnt-clip"

    @property
    def rates(self) -> Mapping[str, float]:
        return {BOTTOM: self.rate, TOP: self.rate}

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        """The step before training."""
        share_G1 = torch.full((x_GK.shape[0], 1), self.start, dtype=torch.float32, device=x_GK.device)
        return _step(torch.sigmoid(share_G1), torch.sigmoid(share_G1), x_GK, grid, scale)

    def init(self, w_OI: Tensor, fmt: Format) -> dict[str, Tensor]:
        """β and γ of every group, (G, 1) float32."""
        groups, _ = fmt.grain.groups((w_OI.shape[0], w_OI.shape[1]))
        return {
            name: torch.full((groups, 1), self.start, dtype=torch.float32, device=w_OI.device) for name in (BOTTOM, TOP)
        }

    def apply(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format) -> Format:
        """The same format with an ordinary step for W, differentiable in these ends, under which any rounder works."""
        return _with(torch.sigmoid(parameters[BOTTOM]), torch.sigmoid(parameters[TOP]), w_OI, fmt)


@dataclass(frozen=True)
class LearntShare(Trained):
    """Learnt shares of the range (AutoRound, arXiv 2309.05516, its alpha and beta).

    The range of a group is [α · min, β · max], 0 ≤ α, β ≤ 1, both 1 at first: before any training it is `minmax`. On a
    symmetric grid the step is the least that reaches both ends.

    Differs: the released code clamps α and β before each use, here one that is at an end takes no gradient that pushes
    it further out; the zero point is rounded with the gradient passed on, as there.
    Cost: as `LearntClip`.

    Attributes:
        rate: learning rate; None: one over the number of steps, as published with signed gradients.
    """

    rate: float | None = None

    @property
    def name(self) -> str:
        return "learnt-share"

    @property
    def rates(self) -> Mapping[str, float | None]:
        return {BOTTOM: self.rate, TOP: self.rate}

    def __call__(self, x_GK: Tensor, grid: Grid, scale: Scale, weight_GK: Tensor | None = None) -> Step:
        """The step before training."""
        share_G1 = torch.ones((x_GK.shape[0], 1), dtype=torch.float32, device=x_GK.device)
        return _step(share_G1, share_G1, x_GK, grid, scale)

    def init(self, w_OI: Tensor, fmt: Format) -> dict[str, Tensor]:
        """α and β of every group, (G, 1) float32."""
        groups, _ = fmt.grain.groups((w_OI.shape[0], w_OI.shape[1]))
        return {name: torch.ones((groups, 1), dtype=torch.float32, device=w_OI.device) for name in (BOTTOM, TOP)}

    def apply(self, parameters: Mapping[str, Tensor], w_OI: Tensor, fmt: Format) -> Format:
        """The same format with an ordinary step for W, differentiable in these shares."""
        return _with(held(parameters[BOTTOM], 0, 1), held(parameters[TOP], 0, 1), w_OI, fmt)


def checked_rate(rate: float | None) -> None:
    """Raises a ValueError where a learning rate is negative."""
    if rate is not None and not rate >= 0:
        raise ValueError(f"a learning rate is 0 or more, not {rate}")


def straight_through(x_GK: Tensor, step: Step, grid: Grid, offset_GK: Tensor | None = None) -> Tensor:
    """What each weight decodes to; the gradient sees rounding as the identity and the grid's ends as ends.

    Bengio et al., arXiv 1308.3432.

    Args:
        offset_GK: in steps, what is added to each weight before it is rounded.
    """
    z_GK = passed(in_steps(x_GK, step, offset_GK).clamp(grid.low, grid.high), grid.snap)
    return (z_GK if step.zero_G1 is None else z_GK - step.zero_G1) * step.scale_G1


def in_steps(x_GK: Tensor, step: Step, offset_GK: Tensor | None = None) -> Tensor:
    """Where each weight lies on the grid before it is rounded, in the order of operations of `Format.encode`."""
    z_GK = x_GK / step.scale_G1
    if step.zero_G1 is not None:
        z_GK = z_GK + step.zero_G1
    return z_GK if offset_GK is None else z_GK + offset_GK


def held(x: Tensor, low: float, high: float) -> Tensor:
    """x clamped; its gradient is cut only where a step against it would lead further out, so it can come back."""
    found: Tensor = _Held.apply(x, low, high)  # type: ignore[no-untyped-call]  # torch's own
    return found


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ends = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high), gradient = ctx.saved_tensors, ctx.ends, gradients[0]
        out = ((x >= high) & (gradient < 0)) | ((x <= low) & (gradient > 0))
        return gradient.masked_fill(out, 0), None, None


def passed(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounded(x)` to the bit, through which the gradient passes as if it were x."""
    found: Tensor = rounded(x.detach()) + (x - x.detach())
    return found


def _with(bottom_G1: Tensor, top_G1: Tensor, w_OI: Tensor, fmt: Format) -> Format:
    x_GK = fmt.grain.split(w_OI).float()
    return replace(fmt, step=_step(bottom_G1, top_G1, x_GK, fmt.grid, fmt.bound(w_OI.detach()).scale))


def _step(bottom_G1: Tensor, top_G1: Tensor, x_GK: Tensor, grid: Grid, scale: Scale) -> Step:
    """The step of these shares of the ranges, as `MinMax` lays a range over the grid; differentiable in the shares, and
    in the weights: what moves the largest of a group is seen to move its step."""
    low_G1, high_G1 = ends(x_GK)
    low_G1 = low_G1.clamp(max=0) * bottom_G1
    high_G1 = high_G1.clamp(min=0) * top_G1
    if grid.symmetric:
        raw_G1 = said(torch.maximum(low_G1 / grid.low, high_G1 / grid.high), grid)
    else:
        raw_G1 = high_G1 / (grid.high - grid.low) - low_G1 / (grid.high - grid.low)
    scale = scale.bind(raw_G1.detach(), grid, 1)
    scale_G1, fields = scale.store(raw_G1.detach())
    scale_G1 = scale_G1 + (raw_G1 - raw_G1.detach())
    if grid.symmetric:
        return Step(scale_G1, None, fields)
    if scale.low is not None:
        kept_G1, beside = scale.low.store(low_G1.detach())
        return Step(scale_G1, lowest(kept_G1 + (low_G1 - low_G1.detach()), scale_G1, grid), {**fields, **beside})
    zero_G1 = passed(grid.low - low_G1 / scale_G1, torch.round).clamp(grid.low, grid.high)
    return Step(scale_G1, zero_G1, {**fields, "zero": grid.encode(zero_G1.detach())})
