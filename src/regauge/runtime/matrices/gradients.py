"""Gradients through packed products: dx = dy W, and rounding is passed straight through.

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
    def forward(ctx: Any, x_TI: Tensor, product: Callable[[Tensor], Tensor], rows: Rows) -> Tensor:
        ctx.rows = rows
        return product(x_TI)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return backward(gradients[0], ctx.rows), None, None


class _Read(torch.autograd.Function):
    """Inputs as they come back from their codes."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, reading: Reading) -> Tensor:
        return reading.simulate(x_TI)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return gradients[0], None


def wanted(x: Tensor) -> bool:
    """Whether a gradient of x will be asked for."""
    return x.requires_grad and torch.is_grad_enabled()


def product(x_TI: Tensor, compute: Callable[[Tensor], Tensor], rows: Rows) -> Tensor:
    """`compute(x_TI)`, (T, O), with the gradient of x Wᵀ."""
    found: Tensor = _Product.apply(x_TI, compute, rows)  # type: ignore[no-untyped-call]  # torch's own
    return found


def read(x_TI: Tensor, reading: Reading) -> Tensor:
    """`reading.simulate(x_TI)`, with the gradient of x."""
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
