"""One matrix of the packed modules as the native step reads it. Legend: O outputs, I inputs, R rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regauge.kernels.cpu.matrix import ACTIVATIONS, META
from regauge.kernels.cpu.step import Site
from regauge.runtime.capabilities import ask
from regauge.runtime.matrices.modules import FullMatrix, PackedMatrix
from regauge.runtime.matrices.operators import AUTOMATIC, few
from regauge.runtime.rows import Read


class Unservable(Exception):
    """The native step cannot run this model; the text says why."""


def site_of(name: str, part: Any, bias: Tensor | None = None) -> Site:
    """A matrix of the packed modules as the step reads it.

    Args:
        name: what an error calls it.
        part: a `PackedMatrix` or `FullMatrix`.

    Raises:
        Unservable: torch's modules alone can multiply by it.
    """
    if isinstance(part, FullMatrix):
        return Site(part.full_OI, bias)
    if not isinstance(part, PackedMatrix) or part.native is None:
        raise Unservable(f"{name} is held in a way that only torch's modules multiply")
    if part.left_OR is not None:
        raise Unservable(f"{name} has a low-rank term beside it")
    return Site(part.native, bias, _rounding(name, part))


def _rounding(name: str, part: PackedMatrix) -> str:
    """How the step rounds what a matrix reads: as the artifact says, or as the packed module does by itself."""
    if part.inputs is None:
        wanted = AUTOMATIC if part.activations is None else ACTIVATIONS[part.activations]
        number = few(part.meta[META.index("bits")] if part.meta else 8, part.dtype, wanted)
        return next(name for name, known in ACTIVATIONS.items() if known == number)
    answer = ask(part.format, part.shape, Read(part.inputs), part.dtype, few=True)
    if not answer.rounds:
        raise Unservable(f"{name} reads {part.inputs.name} inputs, which the step does not round ({answer.why})")
    return f"token{part.inputs.bits}"
