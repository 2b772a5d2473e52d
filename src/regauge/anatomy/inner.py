"""Taps that no matrix reads: what attention works with inside, and the residual between blocks.

`blocks.3.attn.queries`, `.keys` and `.values` are as attention takes them (turned by their position, a head at a time;
a row is one token's head), `.probabilities` is the softmax (a row is one query of one head), and `blocks.3.residual` is
what the block gives. No transform is folded there, for there is no matrix to fold it into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regauge.anatomy.model import Anatomy

QUERIES, KEYS, VALUES, PROBABILITIES = "queries", "keys", "values", "probabilities"
ATTENDED = (QUERIES, KEYS, VALUES, PROBABILITIES)
RESIDUAL = "residual"


def inner_taps(anatomy: Anatomy) -> dict[str, int | None]:
    """Tap → its channels, None where there are as many as tokens; of every block, in their order."""
    found: dict[str, int | None] = {}
    for block in range(anatomy.blocks):
        sizes = anatomy.attention(block)
        if sizes is not None:
            channels = (sizes.head_dim, sizes.head_dim, sizes.value_dim, None)
            found |= {f"blocks.{block}.attn.{word}": size for word, size in zip(ATTENDED, channels, strict=True)}
        found[f"blocks.{block}.{RESIDUAL}"] = anatomy.hidden
    return found


def word_of(tap: str) -> str:
    """The last word of a tap's name: `keys`."""
    return tap.rpartition(".")[2]


def block_of(tap: str) -> int:
    """The block of an inner tap."""
    return int(tap.split(".")[1])
