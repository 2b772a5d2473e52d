"""Random matrices in the panels of the C++ kernels, and what their products may be off by.

Legend: O output channels, I input channels, T tokens, N groups along a row, K weights in a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge.formats.grids import E2M1, E2M3, E3M2, E4M3, E5M2, NF4
from regauge.kernels import reference
from regauge.kernels.cpu import library, matrix
from regauge.kernels.cpu.layout import FLOAT, TABLE, Value, group_of
from regauge.kernels.cpu.matrix import Matrix

TERNARY = torch.tensor([-1.0, 0.0, 1.0])
BOOKS = {
    "fp4": (4, Value(TABLE, table=tuple(E2M1().table.tolist())), E2M1().table),
    "ternary": (2, Value(TABLE, table=(-1.0, 0.0, 1.0)), TERNARY),
    "nf4": (4, Value(TABLE, table=tuple(NF4().table.tolist())), NF4().table),
}
FLOATS = {
    "fp8": (8, Value(FLOAT, mantissa=3, bias=7), E4M3().table),
    "fp8-e5m2": (8, Value(FLOAT, mantissa=2, bias=15), E5M2().table),
    "fp6": (6, Value(FLOAT, mantissa=2, bias=3), E3M2().table),
    "fp6-e2m3": (6, Value(FLOAT, mantissa=3, bias=1), E2M3().table),
}
INTS = {f"int{b}": (b, Value(offset=1 << (b - 1)), torch.arange(1 << b) - float(1 << (b - 1))) for b in range(1, 9)}
ASYM = {f"int{b}-asym": (b, Value(), torch.arange(1 << b).float()) for b in range(1, 9)}
VALUES = INTS | ASYM | BOOKS | FLOATS
STEPS = (None, torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn)
TOP = {"int8": 127, "int16": 32639}
"""The greatest integer that activations are rounded to."""


def levels() -> list[str]:
    if not library.available():
        return []
    kernels, best = library.library(), library.level()
    assert kernels is not None
    found = [name for name in library.LEVELS if kernels.rg_set_level(name.encode()) == 0]
    kernels.rg_set_level(best.encode())
    return found


@dataclass(frozen=True, eq=False)
class Case:
    """A random matrix, packed, and what its codes stand for: `scale` with the multiplier of the row in it."""

    packed: Matrix
    codes_OI: Tensor
    table: Tensor
    scale_ON: Tensor
    zero_ON: Tensor | None
    group: int

    def weights(self) -> Tensor:
        """float32, by the reference."""
        columns = self.codes_OI.shape[1]
        codes_OI = torch.nn.functional.pad(self.codes_OI, (0, -columns % self.group))
        return reference.dequantise(codes_OI, self.table.nan_to_num(), self.scale_ON, self.zero_ON)[:, :columns]

    def allowed(self, x_TI: Tensor, activations: str) -> Tensor:
        """The error that y (T, O) may have: half a step of every rounded activation times its weight, 16 bits of
        a table's values, and float32's own rounding of sums of `columns` products, zero points apart."""
        w_OI, x = self.weights().double(), x_TI.double()
        least = (self.weights() if self.zero_ON is None else replace(self, zero_ON=None).weights()).double().abs()
        allowed = (x.abs() @ (w_OI.abs() + 2 * least).T) * math.sqrt(x.shape[1]) * 2.0**-23
        if activations in TOP and self.packed.meta[6] != FLOAT:
            pad = (0, -x.shape[1] % self.group)
            x_TNK = torch.nn.functional.pad(x, pad).unflatten(1, (-1, self.group))
            half_TN = x_TNK.abs().amax(-1) / TOP[activations] / 2
            w_ONK = torch.nn.functional.pad(w_OI.abs(), pad).unflatten(1, (-1, self.group))
            allowed += 1.001 * half_TN @ w_ONK.sum(-1).T
        if self.packed.meta[6] == TABLE:
            largest = float(self.table.nan_to_num().abs().max()) * self.scale_ON.double().abs().amax(1)
            allowed += x.abs().sum(1, keepdim=True) * largest * 2.0**-16
        return allowed + 1e-30


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(
    name: str,
    rows: int = 37,
    columns: int = 131,
    span: int = 0,
    step: torch.dtype | None = None,
    seed: int = 0,
    cuts: tuple[int, ...] = (),
) -> Case:
    """A matrix of a named value; `span` inputs to a step, 0 for all. Zero points where the name says so. `cuts`:
    groups at which its panels are cut."""
    bits, value, table = VALUES[name]
    some = random(seed)
    written = (~table.isnan()).nonzero().view(-1)
    codes_OI = written[torch.randint(len(written), (rows, columns), generator=some)].to(torch.uint8)
    group = group_of(columns, bits, span or columns)
    count = math.ceil(columns / group)
    row_scale_O = torch.rand(rows, generator=some) + 0.5
    if step is None:
        stored, scale_ON = None, torch.ones(rows, count)
    elif step == torch.uint8:
        stored = torch.randint(110, 140, (rows, count), generator=some, dtype=torch.uint8)
        scale_ON = torch.exp2(stored.float() - 127)
    else:
        stored = (torch.rand(rows, count, generator=some) * 0.1 + 0.01).to(step)
        scale_ON = stored.float()
    zero_ON = None
    if name.endswith("asym"):
        zero_ON = torch.randint(1 << bits, (rows, count), generator=some, dtype=torch.uint8)
    packed = matrix.pack(codes_OI, bits, value, group, stored, zero_ON, row_scale_O, cuts=cuts)
    floats = None if zero_ON is None else zero_ON.float()
    return Case(packed, codes_OI, table, scale_ON * row_scale_O.unsqueeze(1), floats, group)


def tokens(count: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(count, columns, generator=random(seed)).to(dtype)


def close(y_TO: Tensor, x_TI: Tensor, one: Case, activations: str) -> bool:
    """Whether a product is within what rounding allows, and a rounding to its own dtype."""
    wanted = x_TI.double() @ one.weights().double().T
    own = wanted.abs() * {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[y_TO.dtype]
    return bool(((y_TO.double() - wanted).abs() <= one.allowed(x_TI, activations) + own).all())
