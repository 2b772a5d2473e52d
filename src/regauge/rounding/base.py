"""Contracts of rounders and compensators. Legend: O output channels, I input channels, T tokens, R rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from regauge.formats.base import Codes, Format, Term

Stats = Mapping[str, Tensor]
"""Statistics of a site's input X (T, I), by name:

hessian        (I, I) float32 or float64, XᵀX / T
second_moment  (I,)   E[x²]
absmean        (I,)   E|x|
absmax         (I,)   max |x|
minimum        (I,), maximum (I,)
count          ()     int64, tokens seen
drift          (I, I) float64, E[(x − x̂) x̂ᵀ] against the uncompressed model's x; only of sites that need it
"""

DRIFT = "drift"
STATISTICS = ("hessian", "second_moment", "absmean", "absmax", "minimum", "maximum", "count")


@runtime_checkable
class Rounder(Protocol):
    """Which code each weight takes: the nearest of its steps when XᵀX is the identity."""

    @property
    def needs(self) -> frozenset[str]: ...

    def sweeps(self, fmt: Format, shape: tuple[int, int]) -> int:
        """How often such a matrix is rounded with error feedback, O·I² each time; 0 where there is none."""

    def __call__(self, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes: ...


@runtime_checkable
class Compensator(Protocol):
    """What is added back for the error: terms that join `Codes.terms`. See `formats/terms.py` for those there are."""

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def again(self) -> int: ...  # how often what it leaves of a matrix is rounded anew, and it is asked once more

    def bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that it adds to a matrix of this shape."""

    def __call__(self, w_OI: Tensor, w_hat_OI: Tensor, stats: Stats) -> tuple[Term, ...]: ...
