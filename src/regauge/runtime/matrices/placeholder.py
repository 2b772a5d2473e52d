"""What stands where a packed layer is asked for its `weight`: dtype, shape and device of it, and no numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regauge.errors import ModelError

PASSING = ("aten::detach", "aten::alias")
"""Operations that read no numbers: what `.data` and `.detach()` are."""


class Unheld(Tensor):
    """The weight of a packed layer. Computing with it is an error that says so; nothing is ever decoded by it."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Unheld:
        found: Unheld = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's is untyped
        return f"Unheld({tuple(self.shape)}, {self.dtype}, packed)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as torch documents it
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        name = func.name().partition(".")[0]
        if name in PASSING:
            return cls(args[0].shape, args[0].dtype, args[0].device)
        raise ModelError(
            f"a packed layer has no weight to compute with ({name.removeprefix('aten::')} was asked of it): it holds "
            "codes, and multiplies by them. Resize, merge or edit the source, and compress it again."
        )


def weight_of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of a packed layer, to whoever asks for its dtype, shape or device."""
    if torch.compiler.is_compiling():  # which cannot trace into a class of tensors that it does not know
        return torch.empty(*shape, dtype=dtype, device="meta")
    return Unheld(shape, dtype, device)
