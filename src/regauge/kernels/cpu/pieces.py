"""What a program of the step is made of: norms, taps, sites, blocks, each as data and as the C structure that says it.

`native/regauge.h` says what every field means.

Legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regauge.kernels.cpu import checks
from regauge.kernels.cpu.interface import PANEL, Struct, has
from regauge.kernels.cpu.layout import FLOAT, INT
from regauge.kernels.cpu.matrix import ACTIVATIONS, FULL, Matrix
from regauge.kernels.cpu.structs import INT_FIELDS, NORM_FIELDS, SITE_FIELDS, TAP_FIELDS, CLowRank, CNorm, CSite, CTap

FLOAT32 = (torch.float32,)
NORMS = {"none": 0, "rms": 1, "layer": 2}
FUNCTIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
TRANSFORMS = {"identity": 0, "hadamard": 1, "kronecker": 2}
ROUNDINGS = {"plain": 0, "dynamic": 1, "static": 2}


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm; `gain` and `bias` are float32 (size,), contiguous, or None.

    Raises:
        ValueError: they are not, or there is no such kind.
    """

    kind: str
    size: int
    eps: float
    gain: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        checks.named("kind of norm", self.kind, NORMS)
        checks.integers("channels of a norm", (self.size,), 0)
        for what, given in (("gains of a norm", self.gain), ("biases of a norm", self.bias)):
            checks.optional(what, given, FLOAT32, (self.size,))

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
            or of their range where `asymmetric`, both times `step` (a clip; 0: whole). `static`: value = step ·
            (code − zero) throughout, or with the `steps_G` and `zeros_G` of every `group` channels, float32.
        floats: (mantissa bits, greatest value, least normal one) where codes are small floats; None: integers.
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
    steps_G: Tensor | None = None
    zeros_G: Tensor | None = None
    floats: tuple[int, float, float] | None = None

    def __post_init__(self) -> None:
        checks.named("transform of a tap", self.transform, TRANSFORMS)
        checks.named("rounding of a tap", self.rounding, ROUNDINGS)
        checks.integers("sizes, bits and groups of a tap", (self.size, self.bits, self.group), 0)

    def check(self, columns: int) -> None:
        """That its tensors are those of an activation of so many channels.

        Raises:
            ValueError: they are not.
        """
        checks.optional("multipliers of a tap", self.diagonal_I, FLOAT32, (columns,))
        if self.steps_G is not None and (not self.group or columns % self.group):
            raise ValueError(f"{columns} channels are no whole groups of {self.group}, each with a step")
        for what, given in (("steps of a tap", self.steps_G), ("zero points of a tap", self.zeros_G)):
            checks.optional(what, given, FLOAT32, (columns // max(1, self.group),))
        if self.transform == "kronecker":
            if not self.size or columns % self.size or self.left is None or self.right is None:
                raise ValueError(f"{columns} channels are no product of {self.size} and another, each with a matrix")
            checks.tensor("left factors of a tap", self.left, FLOAT32, (self.size, self.size))
            checks.tensor("right factors of a tap", self.right, FLOAT32, (columns // self.size,) * 2)

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
        addresses = map(address, (self.diagonal_I, self.left, self.right, self.steps_G, self.zeros_G))
        how = TRANSFORMS[self.transform], self.size, ROUNDINGS[self.rounding], self.bits, self.group
        mantissa, top, tiny = self.floats or (0, 0.0, 0.0)
        value = INT if self.floats is None else FLOAT
        return CTap(*addresses, *how, int(self.asymmetric), value, mantissa, self.step, self.zero, top, tiny)


@dataclass(frozen=True, eq=False)
class Site:
    """A matrix with its bias (float32, or None). A matrix that is not packed is a contiguous (O, I) tensor.

    Attributes:
        activations: how the product carries inputs that the tap does not round, a name of `ACTIVATIONS`.
        low_rank: (`across` of left_OR, right_RI), contiguous; what is added is left (right x).
        unrounded: whether this site reads its tap before the rounding.

    Raises:
        ValueError: tensors do not fit the matrix.
    """

    matrix: Matrix | Tensor
    bias: Tensor | None = None
    activations: str = "int16"
    low_rank: tuple[Tensor, Tensor] | None = None
    unrounded: bool = False
    _low: list[CLowRank] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        rows, columns = self.matrix.shape
        checks.named("way to carry activations", self.activations, ACTIVATIONS)
        checks.optional("biases", self.bias, FLOAT32, (rows,))
        if self.low_rank is not None:
            left, right = self.low_rank
            if right.ndim != 2 or right.shape[1] != columns:
                raise ValueError(f"a low-rank term that reads {tuple(right.shape)} beside {rows} x {columns}")
            checks.tensor("left factors", left, tuple(checks.DTYPES), (-(-rows // PANEL), right.shape[0], PANEL))

    def struct(self) -> CSite:
        inner = self.matrix.struct if isinstance(self.matrix, Matrix) else full(self.matrix)
        low = None
        if self.low_rank is not None:
            left, right = self.low_rank
            rank, dtype = right.shape[0], checks.number(left.dtype)
            inner_left = Struct(left.data_ptr(), 0, 0, self.matrix.shape[0], rank, dtype, rank, 0, 0, FULL, 0, 0, 0, 0)
            self._low[:] = [CLowRank(inner_left, full(right))]
            low = ctypes.pointer(self._low[0])
        return CSite(inner, address(self.bias), low, ACTIVATIONS[self.activations], int(self.unrounded))


def across(left_OR: Tensor) -> Tensor:
    """(P, R, 16): the left factor of a low-rank term as the kernels read it, sixteen rows side by side."""
    rows, rank = left_OR.shape
    padded = left_OR.new_zeros(-(-rows // PANEL) * PANEL, rank)
    padded[:rows] = left_OR
    return padded.view(-1, PANEL, rank).transpose(1, 2).contiguous()


def full(matrix_OI: Tensor) -> Struct:
    """The C view of a matrix in full precision; rows may be further apart than their columns are many, or columns lie
    one behind another.

    Raises:
        ValueError: it is none that kernels read.
    """
    if matrix_OI.ndim != 2 or not matrix_OI.numel() or not matrix_OI.is_cpu:
        raise ValueError(f"a matrix has rows and columns in this CPU's memory, not {tuple(matrix_OI.shape)}")
    rows, columns = matrix_OI.shape
    checks.integers("rows and columns", (rows, columns), 1)
    if not laid(matrix_OI):
        raise ValueError("the columns of a matrix lie side by side, and its rows one after another")
    across = not _in_rows(matrix_OI)
    stride = -matrix_OI.stride(1) if across else max(columns, matrix_OI.stride(0))
    meta = (rows, columns, checks.number(matrix_OI.dtype), columns, 0, 0, FULL, 0, 0, 0)
    return Struct(matrix_OI.data_ptr(), 0, 0, *meta, stride * matrix_OI.element_size())


def laid(matrix_OI: Tensor) -> bool:
    """Whether kernels read a matrix in full precision that lies so."""
    down, along = matrix_OI.stride()
    return _in_rows(matrix_OI) or (down == 1 and along >= matrix_OI.shape[0] and has("rg_has_columns"))


def _in_rows(matrix_OI: Tensor) -> bool:
    (rows, columns), (down, along) = matrix_OI.shape, matrix_OI.stride()
    return (along == 1 or columns == 1) and (down >= columns or rows == 1)


@dataclass(frozen=True, eq=False)
class Block:
    """What a block is made of; absent norms and sites are left out, and sizes may differ from block to block.

    Attributes:
        norms, sites: by `structs.NORM_FIELDS` and `structs.SITE_FIELDS`.
        experts: (gate or None, up, down) of each.
        integers: by `structs.INT_FIELDS`; absent: 0.
        scale, softcap: of scores.
        taps: by `structs.TAP_FIELDS`; absent: plain.

    Raises:
        ValueError: a name is not one of the fields', or a tap's tensors do not fit what reads it.
    """

    norms: dict[str, Norm]
    sites: dict[str, Site]
    experts: Sequence[tuple[Site | None, Site, Site]] = ()
    integers: dict[str, int] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float = 0.0
    taps: Mapping[str, Tap] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = (
            (self.norms, NORM_FIELDS),
            (self.sites, SITE_FIELDS),
            (self.integers, INT_FIELDS),
            (self.taps, TAP_FIELDS),
        )
        for names, known in given:
            for name in names:
                checks.named("field of a block", name, known)
        checks.integers("the integers of a block", self.integers.values())
        for name, tap in self.taps.items():
            for site in self._readers(name):
                tap.check(site.matrix.shape[1])

    def _readers(self, tap: str) -> list[Site]:
        """The sites that read a tap."""
        names = {"attn_in": ("q", "k", "v"), "attn_mixed": ("o",), "mlp_in": ("gate", "up", "router")}.get(
            tap, ("down",)
        )
        found = [self.sites[name] for name in names if name in self.sites]
        for gate, up, down in self.experts:
            found += {"mlp_in": [*([gate] if gate else []), up], "mlp_hidden": [down]}.get(tap, [])
        return found

    @property
    def cached(self) -> tuple[int, int]:
        """KV heads and head size of its store."""
        return self.integers["kv_heads"], self.integers["head_dim"]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
