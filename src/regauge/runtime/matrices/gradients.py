"""Gradients through packed products: dx = dy W Aᵀ, A the transform of the inputs, and rounding is passed straight
through; but by an input that lies outside the range of a static or a clipped reading nothing passes.

Only inputs have gradients: weights are codes. Legend: O output channels, I input channels, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regauge.formats.readings import Reading
from regauge.runtime.matrices.multiply import blocks

Rows = Callable[[int, int], Tensor]
"""Weights of rows [start, stop), in the dtype of the inputs."""


class _Product(torch.autograd.Function):
    """A product whose kernels tell torch nothing of gradients."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, product: Callable[[Tensor], Tensor], rows: Rows, reading: Reading | None
    ) -> Tensor:
        ctx.rows, ctx.reading = rows, reading
        _keep(ctx, x_TI)
        return product(x_TI)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        dx_TI = backward(gradients[0], ctx.rows)
        return dx_TI if ctx.reading is None else ctx.reading.pulled(dx_TI, *ctx.saved_tensors), None, None, None


class _Read(torch.autograd.Function):
    """Inputs as they come back from their codes."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, reading: Reading) -> Tensor:
        ctx.reading = reading
        _keep(ctx, x_TI)
        return reading.simulate(x_TI)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return ctx.reading.pulled(gradients[0], *ctx.saved_tensors), None


def _keep(ctx: Any, x_TI: Tensor) -> None:
    """Inputs, where what passes depends on them."""
    if ctx.reading is not None and ctx.reading.clips:
        ctx.save_for_backward(x_TI)


def wanted(x: Tensor) -> bool:
    """Whether a gradient of x will be asked for."""
    return x.requires_grad and torch.is_grad_enabled()


def product(x_TI: Tensor, compute: Callable[[Tensor], Tensor], rows: Rows, reading: Reading | None = None) -> Tensor:
    """`compute(x_TI)`, (T, O), with the gradient of x A Wᵀ.

    Args:
        reading: with which `compute` reads x, whose transform is A; None: A is the identity.
    """
    found: Tensor = _Product.apply(x_TI, compute, rows, reading)  # type: ignore[no-untyped-call]  # torch's own
    return found


def read(x_TI: Tensor, reading: Reading) -> Tensor:
    """`reading.simulate(x_TI)`, with the gradient of x A."""
    if not wanted(x_TI):
        return reading.simulate(x_TI)
    found: Tensor = _Read.apply(x_TI, reading)  # type: ignore[no-untyped-call]  # torch's own
    return found


def backward(dy_TO: Tensor, rows: Rows) -> Tensor:
    """dy W (T, I), decoding a block of rows at a time."""
    total: Tensor | None = None
    first = rows(0, 1)
    for start, stop in blocks((dy_TO.shape[1], first.shape[1])):
        part = dy_TO[:, start:stop] @ rows(start, stop)
        total = part if total is None else total.add_(part)
    return dy_TO.new_zeros(len(dy_TO), first.shape[1]) if total is None else total
