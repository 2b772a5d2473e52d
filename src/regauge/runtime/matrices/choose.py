"""The way that one matrix is held and multiplied here, as the capability table says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Grid
from regauge.runtime.capabilities import DECODED, Answer, ask
from regauge.runtime.matrices.multiply import Way, quantised_inputs, way
from regauge.runtime.matrices.native import NAME, Meta, panels
from regauge.runtime.rows import CPU, DEVICES, Read

ELSEWHERE = Answer(DECODED, "the runtime has no kernels for this device")


def choose(
    codes: Codes,
    fmt: Format,
    dtype: torch.dtype,
    device: str = CPU,
    inputs: Grid | None = None,
    activations: str | None = None,
    allocate: Callable[[int], Tensor] | None = None,
) -> tuple[Way, Meta | None]:
    """The way of a matrix, and its `matrix.META` where it lies in panels.

    Args:
        dtype: of the activations.
        inputs: grid of the inputs, a step a token; None: they are not rounded.
        activations: a name of `matrix.ACTIVATIONS`; None: as `operators.few` says.
        allocate: memory for panels.
    """
    shape, kind = (codes.codes_OI.shape[0], codes.codes_OI.shape[1]), torch.device(device).type
    read = None if inputs is None else Read(inputs)
    answer = ask(fmt, shape, read, dtype, kind, here=True) if kind in DEVICES else ELSEWHERE
    rounds = inputs if answer.rounds else None
    if answer.kernel == NAME:
        found, meta = panels(codes, fmt, rounds, activations, allocate)
    else:
        found, meta = way(answer.kernel, fmt, shape, rounds), None
    return (found if inputs is None or answer.rounds else quantised_inputs(found, inputs)), meta
