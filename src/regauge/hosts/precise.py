"""Float64 all the way: transformers' modules ask for float32 inside norms, rotary tables and softmax.

Under `precise()` such requests give float64, so that a float64 model rounds at 1e-16 and not at 1e-7 and an exact move
can be told from a faulty one (seen: 4e-15 against 2e-7). Only inside the `with`; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Float64(TorchFunctionMode):
    """Maps every request for float32 to float64, whoever makes it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.view:  # with a dtype it reinterprets bytes, as loading a file does
            return func(*args, **(kwargs or {}))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [_widen(value) for value in args]
        return func(*args, **{key: _widen(value) for key, value in (kwargs or {}).items()})


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def precise() -> Iterator[None]:
    """Everything that asks for float32 gets float64; tensors made without a dtype are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)
