"""What one block's attention is given, for whoever computes it otherwise: a search that reads keys from codes.

Legend: B sequences, H query heads, K heads of keys and values, T tokens, S tokens that are looked at, D and E channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Heads:
    """Queries, keys and values of a whole text, positions in them.

    Attributes:
        queries_BHTD, keys_BKSD, values_BKSE: as attention takes them, heads of keys not repeated.
        mask: bool, true where a query sees a key, or what is added to products; broadcasts to (B, H, T, S). None: every
            token sees those up to itself.
        scale: of products.
        plain: computes (B, T, H, E) as the model library does.
        beyond: names of what else the family's attention does (caps, sinks), which nobody else computes.
    """

    queries_BHTD: Tensor
    keys_BKSD: Tensor
    values_BKSE: Tensor
    mask: Tensor | None
    scale: float
    plain: Callable[[], Tensor]
    beyond: tuple[str, ...] = ()


Attend = Callable[[Heads], Tensor]
"""Computes (B, T, H, E) of one block's attention."""
