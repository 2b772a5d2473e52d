"""The triangular factor behind error feedback.

Legend: O output channels, I input channels, B columns of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

TRIES = 8


@dataclass(frozen=True, eq=False)
class Factor:
    """H + λI = M Mᵀ with M upper triangular, columns scaled: F_ij = M_ij / M_jj.

    Given errors e_i = w_i − ŵ_i of all columns before j, ‖e M‖² is least, whatever comes after j, when column j takes
    the value w_j + Σ_{i<j} e_i F_ij.

    Attributes:
        feedback_II: F, in the dtype of the sweep; zeros below the diagonal. On it, where F is 1 and nobody reads it,
            stands M_jj: by its square an error of column j alone costs.
        damp: the share of the mean diagonal that was added in the end.
        notes: what had to be changed, in a sentence each.
    """

    feedback_II: Tensor
    damp: float
    notes: tuple[str, ...]

    def conditional(self, w_OB: Tensor, target_OB: Tensor, start: int, end: int) -> Tensor:
        """The best values of columns start … end together, were they free: w + (target − w) F_BB⁻¹.

        `target_OB` holds what each would round given only the errors before `start`.
        """
        block_BB = self.feedback_II[start:end, start:end]
        moved_OB: Tensor = torch.linalg.solve_triangular(
            block_BB, target_OB - w_OB, upper=True, left=False, unitriangular=True
        )
        return w_OB + moved_OB


_KEPT: MutableMapping[Tensor, dict[Hashable, Future[Factor]]] = WeakIdKeyDictionary()
_LOCK = threading.Lock()


def shared(hessian_II: Tensor, how: Hashable, make: Callable[[], Factor]) -> Factor:
    """The factor of one Hessian, made once for all sites and options that read it; it goes when the Hessian goes.

    Args:
        how: what else decides the factor.
    """
    with _LOCK:
        known = _KEPT.setdefault(hessian_II, {})
        first = how not in known
        made: Future[Factor] = known.setdefault(how, Future())
    if first:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)
    return made.result()


def forget(hessian_II: Tensor) -> None:
    """Lets the factors of a Hessian go before it goes itself."""
    with _LOCK:
        _KEPT.pop(hessian_II, None)


def factor(hessian_II: Tensor, damp: float, order_I: Tensor | None, dtype: torch.dtype | None = None) -> Factor:
    """Factor H, symmetric and not negative, in its own dtype.

    Inputs that were always 0 get a diagonal of 1, so that they stand alone. Where float32 fails, float64 is tried, then
    ten times the damping, `TRIES` times. Entries that are not finite count as 0.

    Args:
        damp: share of the mean diagonal (of the inputs that live) added to the diagonal.
        order_I: the order in which columns will be rounded; None: left to right.
        dtype: of the result.

    Cost: I³/3 multiply-adds, four times as dear in float64; two more matrices of the size of H at a time.
    """
    notes = []
    # H from its last row and column on: the lower factor of that, turned back, is the upper factor of H.
    turned_I = None if order_I is None else order_I.flip(0)
    h_II = hessian_II.flip(0, 1) if turned_I is None else hessian_II[turned_I][:, turned_I]
    if not all(bool(end.isfinite()) for end in torch.aminmax(h_II)):  # NaN comes through; no copy is made
        h_II.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        notes.append("the Hessian had entries that are not finite; they count as 0")
    live_I = h_II.diagonal() > 0
    mean = float(h_II.diagonal()[live_I].double().mean()) if bool(live_I.any()) else 1.0
    h_II.diagonal()[~live_I] = 1
    original_I = h_II.diagonal().to(torch.float64, copy=True)
    share = damp
    for _ in range(TRIES):
        h_II.diagonal().copy_(original_I + share * mean)
        lower_II, failed = torch.linalg.cholesky_ex(h_II)
        if int(failed) and h_II.dtype is torch.float32:
            h_II = h_II.double()
            h_II.diagonal().copy_(original_I + share * mean)
            lower_II, failed = torch.linalg.cholesky_ex(h_II)
        if not int(failed):
            if share != damp:
                notes.append(f"the Hessian could not be factored at damp {damp:g}; {share:g} was used")
            del h_II
            upper_II = lower_II.flip(0, 1)
            del lower_II
            own_I = upper_II.diagonal().clone()
            upper_II.div_(own_I)
            upper_II.diagonal().copy_(own_I)
            return Factor(upper_II.to(dtype or hessian_II.dtype).contiguous(), share, tuple(notes))
        share = max(share, 1e-4) * 10
    raise ValueError("the Hessian cannot be factored at any damping: it is not symmetric or not a second moment")
