"""Terms: what a stored matrix is the sum of, beside its codes.

To add one: write it here, add its kind to `KINDS`, and name that kind in the table of parts where a part makes it. An
artifact holds its tensors as `{site}.{kind}.{tensor}`; a kind that is not in `KINDS` is refused by name when it is
written and when it is read, so that none is ever left out of a product.

Legend: O output channels, I input channels, T tokens, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.errors import nearest
from regauge.formats.base import ALL, Codes, Format, Term
from regauge.formats.phases import PHASES, Phases

LOW_RANK = "low-rank"


@dataclass(frozen=True, eq=False)
class Coded:
    """The codes of a matrix as a term like the others; an artifact keeps them by their own names."""

    codes: Codes
    format: Format

    @property
    def kind(self) -> str:
        return "codes"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.codes_OI.shape
        return rows, columns

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes.codes_OI, **self.codes.step.fields}

    @property
    def bytes(self) -> int:
        return self.format.bytes(self.shape)

    def apply(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return torch.addmm(y_TO, x_TI, self.dense().to(x_TI.dtype).t())

    def dense(self, index: slice | Tensor = ALL) -> Tensor:
        return self.format.decode(self.codes)[index]


@dataclass(frozen=True, eq=False)
class LowRank:
    """left (O, R) @ right (R, I)."""

    left_OR: Tensor
    right_RI: Tensor

    def __post_init__(self) -> None:
        if self.left_OR.dim() != 2 or self.right_RI.dim() != 2 or self.left_OR.shape[1] != self.right_RI.shape[0]:
            shapes = f"{list(self.left_OR.shape)} and {list(self.right_RI.shape)}"
            raise ValueError(f"a low-rank term is (O, R) times (R, I), and its factors are {shapes}")

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> LowRank:
        """From `left` and `right`."""
        return LowRank(tensors["left"], tensors["right"])

    @property
    def kind(self) -> str:
        return LOW_RANK

    @property
    def shape(self) -> tuple[int, int]:
        return self.left_OR.shape[0], self.right_RI.shape[1]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"left": self.left_OR, "right": self.right_RI}

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.left_OR, self.right_RI))

    def apply(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return torch.addmm(y_TO, x_TI @ self.right_RI.t(), self.left_OR.t())

    def dense(self, index: slice | Tensor = ALL) -> Tensor:
        return self.left_OR[index] @ self.right_RI


KINDS: Mapping[str, Callable[[Mapping[str, Tensor]], Term]] = {LOW_RANK: LowRank.of, PHASES: Phases.of}
"""Kind → the term from its tensors by name."""
NAMES: Mapping[str, tuple[str, ...]] = {LOW_RANK: ("left", "right"), PHASES: ("codes", "scales")}
"""Kind → the names of its tensors."""


def checked(found: object, shape: tuple[int, int]) -> tuple[Term, ...]:
    """What a part gives as terms of a matrix (O, I): each of a kind that can be read again, whole, and of that shape.

    They are made anew from their tensors, so that what is applied now is what an artifact holds.

    Raises:
        ValueError: says what was given instead.
    """
    if type(found) is not tuple:
        raise ValueError(f"it gives a {type(found).__name__} where a tuple of terms is due")
    terms: list[Term] = []
    for given in found:
        try:
            kind, tensors = given.kind, dict(given.tensors)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"it gives a {type(given).__name__}, which has no kind and tensors of a term") from error
        if kind not in KINDS:
            raise ValueError(f"it gives a term of kind {kind!r}, which nothing applies{nearest(str(kind), KINDS)}")
        if set(tensors) != set(NAMES[kind]):
            has = ", ".join(sorted(map(str, tensors))) or "nothing"
            raise ValueError(f"its term {kind!r} has {has} and wants {' and '.join(NAMES[kind])}")
        term = KINDS[kind](tensors)
        if term.shape != shape:
            raise ValueError(f"its term {kind!r} is {term.shape[0]} x {term.shape[1]}")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError(f"its term {kind!r} holds NaN or infinity")
        if kind in (other.kind for other in terms):
            raise ValueError(f"it gives two terms of kind {kind!r}, and an artifact holds one")
        terms.append(term)
    return tuple(terms)


def summed(codes: Codes, fmt: Format) -> Tensor:
    """The whole matrix (O, I), float32: its codes and every term beside them."""
    w_OI = Coded(codes, fmt).dense()
    for term in codes.terms:
        w_OI = w_OI + _float(term).dense().float()
    return w_OI


def _float(term: Term) -> Term:
    """The term in float32, so that its products are not rounded to the dtype in which it is stored."""
    known = KINDS.get(term.kind)
    return (
        term
        if known is None
        else known({name: in_dtype(tensor, torch.float32) for name, tensor in term.tensors.items()})
    )


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a term in a dtype to compute in; codes stay as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
