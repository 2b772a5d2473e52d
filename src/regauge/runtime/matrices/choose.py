"""The way that one matrix is held and multiplied here, as the capability table says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format
from regauge.formats.readings import Reading
from regauge.runtime.capabilities import DECODED, Answer, ask
from regauge.runtime.matrices import triton
from regauge.runtime.matrices.multiply import Way, quantised_inputs, way
from regauge.runtime.matrices.native import NAME, Meta, panels
from regauge.runtime.rows import CPU, CUDA, DEVICES, Read

ELSEWHERE = Answer(DECODED, "the runtime has no kernels for this device")


def choose(
    codes: Codes,
    fmt: Format,
    dtype: torch.dtype,
    device: str = CPU,
    reading: Reading | None = None,
    activations: str | None = None,
    allocate: Callable[[int], Tensor] | None = None,
) -> tuple[Way, Meta | None]:
    """The way of a matrix, and its `matrix.META` where it lies in panels.

    Args:
        dtype: of the activations.
        reading: how inputs are read; None: as they are.
        activations: a name of `matrix.ACTIVATIONS`; None: as `operators.few` says.
        allocate: memory for panels.
    """
    shape, kind = (codes.codes_OI.shape[0], codes.codes_OI.shape[1]), torch.device(device).type
    read = read_as(reading)
    answer = ask(fmt, shape, read, dtype, kind, here=True) if kind in DEVICES else ELSEWHERE
    rounds = reading if answer.rounds else None
    if answer.kernel == NAME:
        found, meta = panels(codes, fmt, None if rounds is None else rounds.format.grid, activations, allocate)
    elif kind == CUDA and answer.kernel != DECODED:
        found, meta = triton.way(answer.kernel, fmt, shape, rounds), None
    else:
        found, meta = way(answer.kernel, fmt, shape, rounds), None
    return (found if reading is None or answer.rounds else quantised_inputs(found, reading)), meta


def read_as(reading: Reading | None) -> Read | None:
    """A reading as the capability table asks about it."""
    if reading is None:
        return None
    return Read(reading.format.grid, reading.format.grain.name, reading.step is not None, reading.transform.name)
