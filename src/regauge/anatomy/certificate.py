"""Certificates: how far an exact move changed a function, and how far it may.

‖g(enter(x)) − enter(f(x))‖∞ / ‖enter(f(x))‖∞ for a block f and its moved form g on fixed inputs, in float64 (`EXACT`)
and again with both forms' tensors rounded to their storage dtype (`tolerance`). In float64 a fault and a rounding lie
ten orders apart; after storage rounding only a gross fault shows, which is what that second bound is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.errors import ExactnessError

EXACT = 1e-10
"""Of a move in float64: pico models give 1e-14, deep ones a hundred times that."""

TOLERANCE = {torch.float64: EXACT, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}
"""Of moved tensors stored in a dtype, over one block: some hundred times the dtype's own rounding of 2⁻⁵³, 2⁻²⁴, 2⁻¹¹
and 2⁻⁸, since rounding the same function in another gauge draws new errors in every weight."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value, in float64; infinite where anything is not finite."""
    a, b = found.to(torch.float64), expected.to(torch.float64)
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    size = float(b.abs().max())
    distance = float((a - b).abs().max())
    return distance / size if size else distance


def certify(found: Tensor, expected: Tensor, limit: float, what: str) -> float:
    """The relative error, or an ExactnessError that names what was moved (streams and block)."""
    error = relative_error(found, expected)
    if not error <= limit:
        raise ExactnessError(
            f"{what}: the output changed by {error:.1e} of its size, at most {limit:.0e} is rounding; "
            "nothing was written; this is a fault in a move or in the family's table"
        )
    return error
