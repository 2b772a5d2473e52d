"""Moves as values, and the conditions on them.

Why apart from `moves.py`: these are facts about vectors and matrices; which stream admits what stands in the streams.

A stream carries y (size,). A move replaces it by y′: `scale` y′ = s y; `shift` y′ = y + c; `rotate` y′ = Q y;
`affine` y′ = M y; `permute` and `select` y′_i = y_{p(i)}; `centre` y′ = y − mean y; `fold` y′ = y before the norm's
gain and bias (it takes no value: it reads them).

Cost: O(size²) for a rotation (probed with random vectors, not multiplied out), O(size³) for an affine (streams of one
head only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from regauge.anatomy.model import Plumbing
from regauge.errors import MoveError

KINDS = ("scale", "shift", "rotate", "affine", "permute", "select", "centre", "fold")
VALUELESS = ("centre", "fold")
MATRICES = ("rotate", "affine")
INDICES = ("permute", "select")

ORTHOGONAL = 1e-9  # largest relative defect of QᵀQx against x: float64 gives 1e-15, a float32 matrix 1e-6
CONDITION = 1e10  # an affine map beyond this loses more than float64 has to spare


@runtime_checkable
class Rotation(Protocol):
    """An orthogonal map that is cheaper to apply than its matrix, such as a signed Hadamard."""

    @property
    def size(self) -> int: ...

    def __call__(self, x: Tensor, axis: int) -> Tensor:
        """Q applied along one axis of x."""
        ...

    def inverse(self) -> Rotation: ...


@dataclass(frozen=True, eq=False)
class Move:
    """A change on one stream.

    Attributes:
        kind: `scale shift rotate affine permute select centre fold`.
        stream: its name.
        value: scale, shift (size,); rotate, affine (size, size); permute, select (size,), (kept,) of int64; None for
            `centre`, `fold` and for a rotation given as `fast`.
        fast: a rotation that brings its own product.
    """

    kind: str
    stream: str
    value: Tensor | None = None
    fast: Rotation | None = None

    def vector(self) -> Tensor:
        """The value, which must be there (scale, shift, affine, permute, select)."""
        if self.value is None:
            raise MoveError(f"{self.kind} of {self.stream} has no value; give it a tensor")
        return self.value


def check_value(move: Move, size: int, condition: str, plumbing: Plumbing) -> None:
    """Raises MoveError, saying why, unless the value suits the stream's size and the condition it sets."""
    what = f"{move.kind} of {move.stream}"
    if move.kind in VALUELESS:
        return
    if move.fast is not None:
        if move.fast.size != size:
            raise MoveError(f"{what}: the rotation has size {move.fast.size}, the stream has {size} channels")
        return
    value = move.vector().detach()
    wanted = (size, size) if move.kind in MATRICES else (size,)
    if move.kind != "select" and tuple(value.shape) != wanted:
        raise MoveError(f"{what}: the value has shape {tuple(value.shape)}, the stream has {size} channels: {wanted}")
    if move.kind in INDICES:
        _check_indices(what, move.kind, value, size, condition, plumbing)
        return
    if not bool(torch.isfinite(value).all()):
        raise MoveError(f"{what}: the value has NaN or infinite entries")
    value = value.to(torch.float64)
    if move.kind == "scale":
        _check_scale(what, value, condition, plumbing)
    if move.kind == "rotate":
        _check_orthogonal(what, value)
    if move.kind == "affine":
        _check_invertible(what, value)
    if move.kind in MATRICES and condition == "pairs":
        _check_pairs(what, value, plumbing)


def pair_slices(count: int, halves: bool) -> tuple[slice, slice]:
    """The channels of so many rotary pairs: i with i + count where halves turn together, or else 2i with 2i + 1."""
    return (slice(0, count), slice(count, 2 * count)) if halves else (slice(0, 2 * count, 2), slice(1, 2 * count, 2))


def pairs(plumbing: Plumbing) -> tuple[Tensor, Tensor]:
    """The two channels of each rotary pair."""
    half = plumbing.rotary // 2
    first, second = pair_slices(half, plumbing.pairing != "interleaved")
    channels = torch.arange(2 * half, dtype=torch.int64, device="cpu")
    return channels[first], channels[second]


def _check_indices(what: str, kind: str, value: Tensor, size: int, condition: str, plumbing: Plumbing) -> None:
    if value.dtype != torch.int64 or value.dim() != 1:
        raise MoveError(f"{what}: the value must be a vector of int64 indices, not {value.dtype} {tuple(value.shape)}")
    if not len(value) or int(value.min()) < 0 or int(value.max()) >= size or len(set(value.tolist())) != len(value):
        raise MoveError(
            f"{what}: the indices must be distinct and lie in 0..{size - 1}, and there must be at least one"
        )
    if kind == "permute" and condition == "free":
        fixed = torch.arange(plumbing.rotary, dtype=torch.int64, device="cpu")
        if not torch.equal(value[: plumbing.rotary].cpu(), fixed):
            raise MoveError(
                f"{what}: rotary embeddings turn channels 0..{plumbing.rotary - 1}, each pair at its own frequency; "
                "they must stay where they are"
            )


def _check_scale(what: str, value: Tensor, condition: str, plumbing: Plumbing) -> None:
    if condition == "positive" and bool((value <= 0).any()):
        raise MoveError(
            f"{what}: ReLU lets only positive scales through; channel {int(value.argmin())} has a scale <= 0"
        )
    if bool((value == 0).any()):
        raise MoveError(f"{what}: a scale of zero cannot be undone; channel {int((value == 0).nonzero()[0])} has it")
    if condition == "pairs":
        first, second = pairs(plumbing)
        unequal = (value[first] - value[second]).abs() > 1e-12 * value[first].abs()
        if bool(unequal.any()):
            i = int(unequal.nonzero()[0])
            raise MoveError(
                f"{what}: rotary embeddings turn channels {int(first[i])} and {int(second[i])} into each other, "
                "so they must share one scale"
            )


def _check_orthogonal(what: str, q: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(q.shape[0], 4, dtype=q.dtype, generator=generator, device="cpu").to(q.device)
    defect = float((q.T @ (q @ x) - x).abs().max() / x.abs().max())
    if not defect <= ORTHOGONAL:
        raise MoveError(
            f"{what}: the matrix is not orthogonal (QᵀQx differs from x by {defect:.1e}, at most {ORTHOGONAL:.0e} "
            "allowed); compute it in float64, or use affine where the stream admits it"
        )


def _check_invertible(what: str, m: Tensor) -> None:
    condition = float(torch.linalg.cond(m))
    if not condition <= CONDITION:
        raise MoveError(f"{what}: the matrix is singular or nearly so (condition number {condition:.1e})")


def _check_pairs(what: str, m: Tensor, plumbing: Plumbing) -> None:
    """On rotary channels only aR(θ) inside each pair commutes with the embedding; the rest may do as it likes."""
    first, second = (index.to(m.device) for index in pairs(plumbing))
    allowed = torch.zeros_like(m, dtype=torch.bool)
    allowed[plumbing.rotary :, plumbing.rotary :] = True
    for row in (first, second):
        for column in (first, second):
            allowed[row, column] = True
    tolerance = 1e-12 * float(m.abs().max())
    if bool((m[~allowed].abs() > tolerance).any()):
        raise MoveError(f"{what}: rotary embeddings allow mixing only inside each pair of channels")
    same = m[first, first] - m[second, second]
    opposite = m[first, second] + m[second, first]
    if len(first) and max(float(same.abs().max()), float(opposite.abs().max())) > tolerance:
        raise MoveError(
            f"{what}: inside a rotary pair only a turn with one scale keeps the score; a reflection or a shear does not"
        )
