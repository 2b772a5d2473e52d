"""One matrix of the packed modules as the native step reads it. Legend: O outputs, I inputs, R rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regauge.kernels.cpu.matrix import ACTIVATIONS, META
from regauge.kernels.cpu.step import Site, Tap
from regauge.runtime.matrices.modules import FullMatrix, PackedMatrix
from regauge.runtime.matrices.operators import AUTOMATIC, few


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
    low_rank = None
    if part.left_OR is not None and part.right_RI is not None:
        low_rank = part.left_OR, part.right_RI
    return Site(part.native, bias, _carried(part), low_rank)


def tap_of(name: str, part: Any) -> Tap:
    """How a matrix of the packed modules reads its input, as the artifact says.

    Raises:
        Unservable: on a grid that the step does not round to.
    """
    if not isinstance(part, PackedMatrix) or part.inputs is None:
        return Tap()
    if part.inputs.kind != "integer" or part.inputs.bits < 2:
        raise Unservable(f"{name} reads {part.inputs.name} inputs, which the step does not round")
    return Tap(rounding="dynamic", bits=part.inputs.bits, asymmetric=not part.inputs.symmetric)


def _carried(part: PackedMatrix) -> str:
    """How products carry what no tap rounds: as the packed module does by itself."""
    wanted = AUTOMATIC if part.activations is None else ACTIVATIONS[part.activations]
    number = few(part.meta[META.index("bits")] if part.meta else 8, part.dtype, wanted)
    return next(name for name, known in ACTIVATIONS.items() if known == number)
