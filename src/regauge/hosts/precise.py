"""Float64 all the way: a library's modules ask for float32 inside norms, rotary tables and softmax.

Under `precise()` such requests give float64, so that a float64 model rounds at 1e-16 and not at 1e-7 and an exact move
can be told from a faulty one (seen: 4e-15 against 2e-7). Only inside the `with`, and only in this thread: nothing is
patched, and no default of the process is set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAKING = {torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor, torch.arange, torch.linspace}
MAKING |= {torch.logspace, torch.scalar_tensor}
"""What makes tensors in the default dtype where none is named."""


class _Float64(TorchFunctionMode):
    """Maps every request for float32 to float64, whoever makes it, and every float32 that nobody asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.Tensor.view:  # with a dtype it reinterprets bytes, as loading a file does
            return func(*args, **named)
        if func in (torch.rand, torch.randn):  # drawn once
            named.setdefault("dtype", torch.float64)
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, named = [_widen(value) for value in args], {key: _widen(value) for key, value in named.items()}
        found = func(*args, **named)
        if not isinstance(found, Tensor) or found.dtype is not torch.float32:
            return found
        if func in MAKING:
            return func(*args, **(named | {"dtype": torch.float64}))
        if any(isinstance(value, Tensor) for value in args) and not any(map(_floating, args)):
            return func(*map(_double, args), **named)  # a quotient of whole numbers, say
        return found


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype is not torch.bool else value


@contextmanager
def precise() -> Iterator[None]:
    """Everything in this thread that asks for float32 gets float64; tensors made without a dtype are float64 too."""
    with _Float64():
        yield
