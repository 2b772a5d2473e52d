"""Terms beside the codes of a packed matrix, as modules hold them.

`left` of a low-rank term lies sixteen rows side by side, as the kernels read it, and in no other form. Values of code 0
that panels do not read are columns of `left`, one a group along the row, kept in float32 whatever the model is cast to;
what they are multiplied by, the sum of the inputs of a group, needs no bytes of its own.

Legend: O output channels, I input channels, N groups along a row, P panels of sixteen rows, R rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from regauge.errors import ModelError
from regauge.formats.base import ALL, Term
from regauge.formats.terms import KINDS, LOW_RANK, in_dtype
from regauge.kernels.cpu.matrix import PANEL
from regauge.kernels.cpu.pieces import across


def sums(groups: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(N, I): 1 where an input is in a group. All matrices of one width share it."""
    if torch.compiler.is_compiling():
        return _sums(groups, columns, dtype, device)
    with torch.inference_mode(False):
        return _shared(groups, columns, dtype, device)


def _sums(groups: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(groups, dtype=dtype, device=device).repeat_interleave(columns // groups, 1)


_shared = lru_cache(maxsize=32)(_sums)


class HeldTerm(nn.Module):
    """A term beside the codes of a matrix, its tensors as buffers, so that it goes where the model goes."""

    def __init__(self, term: Term, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = term.kind
        for name, tensor in term.tensors.items():
            self.register_buffer(name, in_dtype(tensor, dtype))

    @property
    def term(self) -> Term:
        """The term, of the buffers as they are now."""
        return KINDS[self.kind](cast(dict[str, Tensor], self._buffers))

    def apply_to(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """y + x Wᵀ."""
        return self.term.apply(x_TI, y_TO)

    def dense(self, dtype: torch.dtype, index: slice | Tensor = ALL) -> Tensor:
        """Some rows of it."""
        return self.term.dense(index).to(dtype)

    def prefix(self, rows: int, columns: int) -> HeldTerm:
        """Of the first rows and inputs of the matrix.

        Raises:
            ModelError: its kind has no first part.
        """
        raise ModelError(f"a {self.kind} term beside the codes of a matrix has no first rows and inputs")

    def scaled(self, gain_O: Tensor) -> HeldTerm:
        """Each row of it times a number.

        Raises:
            ModelError: its kind cannot be multiplied so.
        """
        raise ModelError(f"a {self.kind} term beside the codes of a matrix has no multiplier a row")


class HeldLowRank(HeldTerm):
    """A low-rank term.

    Attributes:
        rows: O.
        groups: leading columns of `left` that are values of code 0, of N groups; 0: none.
        left: (P, R, 16).
        right: (R − N, I).
    """

    left: Tensor
    right: Tensor

    def __init__(self, lows_ON: Tensor | None, term: Term | None, columns: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.kind, self.groups = LOW_RANK, 0 if lows_ON is None else lows_ON.shape[1]
        given = torch.empty(0, columns, dtype=dtype, device="cpu") if term is None else term.tensors["right"].to(dtype)
        lefts = [] if term is None else [term.tensors["left"]]
        if lows_ON is None:
            (left_OR,) = (left.to(dtype) for left in lefts)
        else:
            left_OR = torch.cat([lows_ON.float(), *(left.float() for left in lefts)], 1)
        self.rows = left_OR.shape[0]
        self.register_buffer("left", across(left_OR))
        self.register_buffer("right", given.contiguous())

    @property
    def right_RI(self) -> Tensor:
        """The right factor, whole, in the dtype of the model."""
        if not self.groups:
            return self.right
        sums_NI = sums(self.groups, self.right.shape[1], self.right.dtype, self.right.device)
        return torch.cat([sums_NI, self.right]) if len(self.right) else sums_NI

    def prefix(self, rows: int, columns: int) -> HeldLowRank:
        """Of the first rows and inputs of the matrix: new memory, a group's value or a rank a row."""
        new = HeldLowRank.__new__(HeldLowRank)
        nn.Module.__init__(new)
        span = self.right.shape[1] // self.groups if self.groups else 1
        if columns % span:
            raise ModelError(
                f"{columns} inputs are no whole groups of {span}, which have a value each beside the codes"
            )
        groups = columns // span if self.groups else 0
        new.kind, new.groups, new.rows = self.kind, groups, rows
        left = self.left[: -(-rows // PANEL)]
        new.register_buffer("left", torch.cat([left[:, :groups], left[:, self.groups :]], 1).contiguous())
        new.register_buffer("right", self.right[:, :columns].contiguous())
        return new

    def with_lows(self, lows_ON: Tensor) -> HeldLowRank:
        """With other values of code 0, a group each."""
        new = HeldLowRank.__new__(HeldLowRank)
        nn.Module.__init__(new)
        new.kind, new.groups, new.rows = self.kind, self.groups, self.rows
        left = torch.cat([across(lows_ON.float()), self.left[:, self.groups :]], 1)
        new.register_buffer("left", left.contiguous())
        new.register_buffer("right", self.right)
        return new

    def joined(self, term: Term) -> HeldLowRank:
        """Values of code 0 alone, with a low-rank term beside them."""
        new = HeldLowRank.__new__(HeldLowRank)
        nn.Module.__init__(new)
        new.kind, new.groups, new.rows = self.kind, self.groups, self.rows
        left = across(term.tensors["left"].to(self.left))
        new.register_buffer("left", torch.cat([self.left, left], 1).contiguous())
        new.register_buffer("right", term.tensors["right"].to(self.right).contiguous())
        return new

    def scaled(self, gain_O: Tensor) -> HeldLowRank:
        """Each row of it times a number: a left factor of its own."""
        new = HeldLowRank.__new__(HeldLowRank)
        nn.Module.__init__(new)
        new.kind, new.groups, new.rows = self.kind, self.groups, self.rows
        new.register_buffer("left", self.left * across(gain_O.to(self.left)[:, None]))
        new.register_buffer("right", self.right)
        return new

    def _left(self, index: slice | Tensor) -> Tensor:
        """Rows of the left factor (n, R), row behind row also where there is one panel: products are the same bits."""
        if isinstance(index, Tensor):
            return self.left[index // PANEL, :, index % PANEL]
        start, stop, _ = index.indices(self.rows)
        first = start // PANEL
        rows_nR = self.left[first : -(-stop // PANEL)].transpose(1, 2).contiguous().flatten(0, 1)
        return rows_nR[start - first * PANEL : stop - first * PANEL]

    def apply_to(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        return torch.addmm(y_TO, x_TI @ self.right_RI.t(), self._left(ALL).to(x_TI.dtype).t())

    def dense(self, dtype: torch.dtype, index: slice | Tensor = ALL) -> Tensor:
        return self._left(index).to(dtype) @ self.right_RI.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldLowRank:
        """Values of code 0 stay in float32: what a narrow dtype rounds would not come back."""
        before = self.left
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if self.groups and self.left.dtype != before.dtype:
            self.left = before.to(self.left.device)
        return self


def held_terms(terms: Sequence[Term], lows_ON: Tensor | None, columns: int, dtype: torch.dtype) -> Iterator[HeldTerm]:
    """The terms of a matrix as modules; values of code 0 and a low-rank term are one, as the step adds one.

    Args:
        lows_ON: values of code 0 that the matrix is held without; None: none.
        columns: I.
        dtype: of activations.
    """
    low_rank = next((term for term in terms if term.kind == LOW_RANK), None)
    if lows_ON is not None or low_rank is not None:
        yield HeldLowRank(lows_ON, low_rank, columns, dtype)
    for term in terms:
        if term.kind != LOW_RANK:
            yield HeldTerm(term, dtype)
