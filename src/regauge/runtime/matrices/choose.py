"""The way that one matrix is held and multiplied here, as the capability table says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format
from regauge.formats.readings import Reading
from regauge.runtime.capabilities import DECODED, Answer, ask
from regauge.runtime.matrices import int4, triton
from regauge.runtime.matrices.codes import alone
from regauge.runtime.matrices.multiply import Way, quantised_inputs, way
from regauge.runtime.matrices.native import NAME, Meta, meta_of_codes, panels
from regauge.runtime.rows import CPU, CUDA, DEVICES, Read

ELSEWHERE = Answer(DECODED, "the runtime has no kernels for this device")


@dataclass(frozen=True, eq=False)
class Choice:
    """How one matrix is held and multiplied. All that a `Way` is made of but functions, so that it can be pickled.

    Attributes:
        kernel: of the capability table; `decoded` for none.
        shape: (O, I).
        kind: of device.
        reading: how inputs are read; None: as they are.
        rounds: whether the kernel rounds them so by itself.
        activations: as `choose` says.
        meta: `matrix.META` of panels, in runs or of a first part with the stride; None where another way holds them.
        whole: inputs of the matrix of which this is the first ones; None: its own.
        widths: numbers of its first inputs that members of a family use.
    """

    kernel: str
    format: Format
    shape: tuple[int, int]
    kind: str
    reading: Reading | None
    rounds: bool
    activations: str | None
    meta: Meta | None
    whole: int | None = None
    widths: Sequence[int] = ()

    @property
    def differentiable(self) -> bool:
        """Whether torch knows the gradient of the product: the operators of panels tell it."""
        return self.meta is not None and (self.reading is None or (self.rounds and alone(self.reading)))

    @property
    def told(self) -> str:
        """What must be the same of two matrices for one to read the other's bytes, as text."""
        fmt, reading = self.format, self.reading
        tables = [fmt.grid.table, *(() if reading is None else (reading.format.grid.table, *reading.tensors.values()))]
        digest = sha256(repr((self.meta, int4.block_size() if self.kernel == INT4 else 0)).encode())
        for tensor in tables:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        read = "" if reading is None else f", {reading.name} inputs of a {reading.format.grain.name}"
        how = f"{fmt.grid.name} of a {fmt.grain.name}, steps in {fmt.scale.name}{read}"
        return f"{self.shape[0]} x {self.shape[1]} {how} ({self.kernel}, {self.kind}; {digest.hexdigest()[:12]})"


INT4 = "int4"


def choose(
    codes: Codes,
    fmt: Format,
    dtype: torch.dtype,
    device: str = CPU,
    reading: Reading | None = None,
    activations: str | None = None,
    whole: int | None = None,
    widths: Sequence[int] = (),
) -> Choice:
    """The way of a matrix.

    Args:
        dtype: of the activations.
        reading: how inputs are read; None: as they are.
        activations: a name of `matrix.ACTIVATIONS`; None: as `operators.few` says.
        whole: inputs of the matrix of which this is the first ones, which is held and multiplied as that is.
        widths: numbers of its first inputs that members of a family use; they then lie together.
    """
    shape, kind = (codes.codes_OI.shape[0], codes.codes_OI.shape[1]), torch.device(device).type
    read, wide = read_as(reading), (shape[0], max(shape[1], whole or 0))
    answer = ask(fmt, wide, read, dtype, kind, here=True) if kind in DEVICES else ELSEWHERE
    meta = meta_of_codes(codes, fmt, whole, widths) if answer.kernel == NAME else None
    return Choice(answer.kernel, fmt, shape, kind, reading, answer.rounds, activations, meta, whole, tuple(widths))


def way_of(choice: Choice, allocate: Callable[[int], Tensor] | None = None) -> Way:
    """The functions of a choice.

    Args:
        allocate: memory for panels.
    """
    fmt, shape, reading = choice.format, choice.shape, choice.reading
    rounds = reading if choice.rounds else None
    if choice.meta is not None:
        found = panels(fmt, choice.meta, rounds, choice.activations, allocate, choice.whole)
    elif choice.kind == CUDA and choice.kernel != DECODED:
        found = triton.way(choice.kernel, fmt, shape, rounds)
    else:
        found = way(choice.kernel, fmt, shape, rounds)
    return found if reading is None or choice.rounds else quantised_inputs(found, reading)


def read_as(reading: Reading | None) -> Read | None:
    """A reading as the capability table asks about it."""
    if reading is None:
        return None
    return Read(
        reading.format.grid,
        reading.format.grain.name,
        reading.step is not None,
        reading.transform.name,
        reading.share_1 is not None,
    )
