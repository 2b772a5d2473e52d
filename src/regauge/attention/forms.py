"""Masks of attention's forms, as functions of indices that FlexAttention takes, and dense.

A form is `f(b, h, q, k) -> bool` over tensors of indices, where q and k count tokens of the text from 0: `flex_mask` of
torch (`create_block_mask`) takes it as it is, and `dense` makes the whole mask of it. Windows count as transformers'
do: w tokens, the query's own among them (attention-gym's keep w + 1).

Legend: B sequences, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Itself and everything before."""
    return k <= q


def window(tokens: int, sinks: int = 0) -> Form:
    """The last `tokens` tokens, and the first `sinks` of the text."""
    return lambda b, h, q, k: (k <= q) & ((k > q - tokens) | (k < sinks))


def by_head(tokens_H: Tensor, sinks_H: Tensor) -> Form:
    """A window for each head: int64 (H,); a head that sees everything has one longer than any text."""
    return lambda b, h, q, k: (k <= q) & ((k > q - tokens_H[h]) | (k < sinks_H[h]))


def neighbourhood(length: int, tokens: int, dilation: int = 1, causal: bool = False) -> Form:
    """Exactly `tokens` keys for every query (2403.04690, one axis): the nearest ones, in its residue class of
    `dilation`; at a border the window shifts, and neither shrinks nor wraps. Even windows reach further to the left.

    Args:
        length: of the text; each residue class has its own.
        causal: the query is the last of them instead, and there are fewer at the start.

    Raises:
        ValueError: the text is shorter than tokens · dilation.
    """
    if tokens < 1 or dilation < 1 or tokens * dilation > length:
        raise ValueError(f"a neighbourhood of {tokens} tokens, {dilation} apart, does not fit a text of {length}")

    def form(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own, at = q // dilation, k // dilation
        if causal:
            first, last = own - tokens + 1, own
        else:
            held = (length - q % dilation + dilation - 1) // dilation  # tokens of its residue class
            first = torch.minimum((own - tokens // 2).clamp(min=0), held - tokens)
            last = first + tokens - 1
        return (q % dilation == k % dilation) & (at >= first) & (at <= last)

    return form


def anchored(documents_BT: Tensor) -> Form:
    """AnchorAttention (2411.13476), for packed training on long texts: a token sees its own document, and the anchor.

    The anchor is the token at index 0, the text's one beginning-of-sequence token: whoever packs puts it there once,
    leaves the documents' own out, and does **not** begin positions anew in each document. It repairs nothing of how
    rotary products are rounded (`regauge inspect --positions` measures that): the documents are not exposed to it, for
    all that is seen across them is one token.

    Args:
        documents_BT: int64, which document each token is of; the anchor's own number counts for nothing.
    """
    return lambda b, h, q, k: (k <= q) & ((documents_BT[b, q] == documents_BT[b, k]) | (k == 0))


def dense(form: Form, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
    """seen_BHQK, bool, of queries that are the last of the keys."""
    axes = (batch, heads, queries, keys)
    b, h, q, k = (
        torch.arange(size, dtype=torch.int64, device=device).view([-1 if axis == n else 1 for axis in range(4)])
        for n, size in enumerate(axes)
    )
    return form(b, h, q + keys - queries, k).expand(axes)
