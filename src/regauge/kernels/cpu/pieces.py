"""What a program of the step is made of: norms, taps, sites, blocks, each as data and as the C structure that says it.

`native/regauge.h` says what every field means.

Legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from regauge.kernels.cpu.interface import Struct, struct_of
from regauge.kernels.cpu.matrix import ACTIVATIONS, DTYPES, FULL, Matrix
from regauge.kernels.cpu.structs import CLowRank, CNorm, CSite, CTap

NORMS = {"none": 0, "rms": 1, "layer": 2}
FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
TRANSFORMS = {"identity": 0, "hadamard": 1, "kronecker": 2}
ROUNDINGS = {"plain": 0, "dynamic": 1, "static": 2}


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm; `gain` and `bias` are float32 or None."""

    kind: str
    size: int
    eps: float
    gain: Tensor | None = None
    bias: Tensor | None = None

    def struct(self) -> CNorm:
        return CNorm(address(self.gain), address(self.bias), NORMS[self.kind], self.size, self.eps)


@dataclass(frozen=True, eq=False)
class Tap:
    """How an activation is read by every site that reads it: times `diagonal_I`, a transform, then codes.

    Attributes:
        transform: of `TRANSFORMS`. `hadamard`: normalised, Sylvester's order, on runs of `size` channels, a power of
            two. `kronecker`: x (left ⊗ right), left (size, size).
        diagonal_I, left, right: float32, contiguous.
        rounding: of `ROUNDINGS`. `dynamic`: the step is reach / ((2^bits − 1) / 2) of `group` channels (0: of a token),
            or of their range where `asymmetric`. `static`: value = step · (code − zero) throughout.
    """

    transform: str = "identity"
    size: int = 0
    diagonal_I: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    rounding: str = "plain"
    bits: int = 8
    group: int = 0
    asymmetric: bool = False
    step: float = 0.0
    zero: float = 0.0

    @property
    def transforms(self) -> bool:
        """Whether sites read something else than the activation, but for its rounding."""
        return self.transform != "identity" or self.diagonal_I is not None

    @property
    def plain(self) -> bool:
        """Whether sites read the activation as it is."""
        return self.rounding == "plain" and not self.transforms

    def same(self, other: Tap) -> bool:
        """Whether both read an activation alike, wherever their tensors lie."""
        one, two = vars(self), vars(other)
        return all(
            found.equal(two[name])
            if isinstance(found, Tensor) and isinstance(two[name], Tensor)
            else found == two[name]
            for name, found in one.items()
        )

    def struct(self) -> CTap:
        addresses = map(address, (self.diagonal_I, self.left, self.right))
        how = TRANSFORMS[self.transform], self.size, ROUNDINGS[self.rounding], self.bits, self.group
        return CTap(*addresses, *how, int(self.asymmetric), self.step, self.zero)


@dataclass(frozen=True, eq=False)
class Site:
    """A matrix with its bias (float32, or None). A matrix that is not packed is a contiguous (O, I) tensor.

    Attributes:
        activations: how the product carries inputs that the tap does not round, a name of `ACTIVATIONS`.
        low_rank: (left_OR, right_RI), contiguous; what is added is left (right x).
        unrounded: whether this site reads its tap before the rounding.
    """

    matrix: Matrix | Tensor
    bias: Tensor | None = None
    activations: str = "int16"
    low_rank: tuple[Tensor, Tensor] | None = None
    unrounded: bool = False
    _low: list[CLowRank] = field(default_factory=list, repr=False)

    def struct(self) -> CSite:
        inner = self.matrix.struct if isinstance(self.matrix, Matrix) else full(self.matrix)
        low = None
        if self.low_rank is not None:
            self._low[:] = [CLowRank(*map(full, self.low_rank))]
            low = ctypes.pointer(self._low[0])
        return CSite(inner, address(self.bias), low, ACTIVATIONS[self.activations], int(self.unrounded))


def full(matrix_OI: Tensor) -> Struct:
    """The C view of a matrix in full precision; rows may be further apart than their columns are many."""
    rows, columns = matrix_OI.shape
    meta = (rows, columns, DTYPES[matrix_OI.dtype], columns, 0, 0, FULL, 0, 0, 0)
    if matrix_OI.stride(1) != 1:
        raise ValueError("the columns of a matrix lie side by side")
    return struct_of(matrix_OI, None, None, meta, matrix_OI.stride(0) * matrix_OI.element_size())


@dataclass(frozen=True, eq=False)
class Block:
    """What a block is made of; absent norms and sites are left out, and sizes may differ from block to block.

    Attributes:
        norms, sites: by `structs.NORM_FIELDS` and `structs.SITE_FIELDS`.
        experts: (gate or None, up, down) of each.
        integers: by `structs.INT_FIELDS`; absent: 0.
        scale, softcap: of scores.
        taps: by `structs.TAP_FIELDS`; absent: plain.
    """

    norms: dict[str, Norm]
    sites: dict[str, Site]
    experts: Sequence[tuple[Site | None, Site, Site]] = ()
    integers: dict[str, int] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float = 0.0
    taps: Mapping[str, Tap] = field(default_factory=dict)

    @property
    def cached(self) -> tuple[int, int]:
        """KV heads and head size of its store."""
        return self.integers["kv_heads"], self.integers["head_dim"]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
