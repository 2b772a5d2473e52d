"""One matrix of the packed modules as the native step reads it. Legend: O outputs, I inputs, R rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from regauge.formats.base import Step
from regauge.formats.terms import LOW_RANK
from regauge.formats.transforms import Transform
from regauge.kernels.cpu.matrix import ACTIVATIONS, META
from regauge.kernels.cpu.pieces import Site, Tap
from regauge.kernels.cpu.sweep import FLOATS
from regauge.runtime.capabilities import ask
from regauge.runtime.matrices.choose import read_as
from regauge.runtime.matrices.modules import FullMatrix, PackedMatrix
from regauge.runtime.matrices.operators import AUTOMATIC, few
from regauge.runtime.matrices.terms import HeldLowRank


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
    for term in part.added:
        if term.kind != LOW_RANK or low_rank is not None:
            raise Unservable(f"{name} has a {term.kind} term beside it, which the step does not add")
        low_rank = cast(HeldLowRank, term).left, cast(HeldLowRank, term).right_RI
    return Site(part.native, bias, _carried(part), low_rank)


def tap_of(name: str, part: Any) -> Tap:
    """How a matrix of the packed modules reads its input, as the artifact says.

    Raises:
        Unservable: on a grid or in groups that the step does not round to, or through a transform that it has not.
    """
    if not isinstance(part, PackedMatrix) or part.reading is None:
        return Tap()
    reading, columns = part.reading, part.shape[1]
    grid, grain = reading.format.grid, reading.format.grain
    answer = ask(part.format, part.shape, read_as(reading), part.dtype, step=True)
    if not answer.rounds:
        raise Unservable(f"{name} reads {reading.name} inputs, which the step does not round: {answer.why}")
    values = grid.kernel
    floats = (values.mantissa, values.high, values.tiny) if values is not None and values.kind == FLOATS else None
    if floats is None and grid.kind != "integer":
        raise Unservable(f"{name} reads {reading.name} inputs, which the step does not round")
    tap = replace(_transform(name, reading.transform, columns), bits=grid.bits, floats=floats)
    tap = replace(tap, asymmetric=not grid.symmetric)
    span = grain.span((2, columns))
    if reading.step is not None:
        return _static(tap, reading.step, 0 if span == columns else span)
    if grain.groups((2, columns))[0] != 2 * (columns // span):
        raise Unservable(f"{name} reads inputs with one step a {grain.name}, and the step takes one a token or group")
    share = 1.0 if reading.share_1 is None else float(reading.share_1)
    return replace(tap, rounding="dynamic", group=0 if span == columns else span, step=share)


def _static(tap: Tap, step: Step, group: int) -> Tap:
    """The tap with steps that are known before: one, or one a group of channels."""
    if not group:
        zero = 0.0 if step.zero_G1 is None else float(step.zero_G1)
        return replace(tap, rounding="static", step=float(step.scale_G1), zero=zero)
    steps_G = step.scale_G1.float().flatten().contiguous()
    zeros_G = None if step.zero_G1 is None else step.zero_G1.float().flatten().contiguous()
    return replace(tap, rounding="static", group=group, steps_G=steps_G, zeros_G=zeros_G)


def _transform(name: str, transform: Transform, columns: int) -> Tap:
    """The transform of a tap as the step applies it."""
    if not transform.changes:
        return Tap()
    found = transform.native
    if found is None:
        raise Unservable(f"{name} reads its input through {transform.name}, which the step does not apply")
    if found.pair is None:
        return Tap(diagonal_I=found.diagonal_I)
    left, right = found.pair
    if found.sylvester:
        return Tap("hadamard", columns)
    return Tap("kronecker", left.shape[0], left=left, right=right)


def _carried(part: PackedMatrix) -> str:
    """How products carry what no tap rounds: as the packed module does by itself."""
    wanted = AUTOMATIC if part.activations is None else ACTIVATIONS[part.activations]
    number = few(part.meta[META.index("bits")] if part.meta else 8, part.dtype, wanted)
    return next(name for name, known in ACTIVATIONS.items() if known == number)
