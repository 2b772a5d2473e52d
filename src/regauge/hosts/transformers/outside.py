"""Embedding and head by rows: neither is ever cast, nor rebuilt from codes, as a whole.

The table of a vocabulary is a large matrix: 0.5 of 8 billion weights, 2 GB in float32. Only the rows that
are asked for are cast, and logits are taken some rows of the head at a time. A matrix may also be given as what makes
its rows, which is how a search runs options that lie on disk in codes. This serves torch's `Embedding` and `Linear`;
other modules (one that scales what it looks up, say) are given the whole matrix.
Legend: V vocabulary, D hidden, R rows, n tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regauge.anatomy.model import Anatomy
from regauge.hosts.base import Rows

STRIP = 8192
"""Rows of a head that are cast at a time."""


def modules(shell: Any, anatomy: Anatomy) -> dict[str, Any]:
    """Site → its module, of embedding and head, where that is torch's own and can be run by rows."""
    found: dict[str, Any] = {}
    for site in anatomy.in_block(None):
        if site.name in ("embed", "head"):
            module = shell.get_submodule(site.module)
            plain = type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)
            found |= {site.name: module} if plain and module.weight.dim() == 2 else {}
    return found


@contextmanager
def by_rows(
    served: Mapping[str, Any], rows: Mapping[str, Rows], matrices: torch.dtype, dtype: torch.dtype
) -> Iterator[None]:
    """While it lasts, embedding and head are run by rows, of the parameters that they are given or of `rows`.

    Args:
        matrices: in which a table is looked up; dtype: in which logits are computed.
    """
    with ExitStack() as stack:
        for name, module in served.items():
            run = _lookup if name == "embed" else _product
            module.forward = run(module, rows.get(name), matrices if name == "embed" else dtype)
            stack.callback(delattr, module, "forward")
        yield


def _lookup(module: Any, rows: Rows | None, dtype: torch.dtype) -> Any:
    def forward(ids: Tensor) -> Tensor:
        if rows is None:
            return nn.functional.embedding(ids, module.weight).to(dtype)
        met, places = torch.unique(ids, return_inverse=True)
        return rows(met).to(dtype)[places]

    return forward


def _product(module: Any, rows: Rows | None, dtype: torch.dtype) -> Any:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = x.to(dtype)
            whole = rows is None and module.weight.dtype is dtype
            y = nn.functional.linear(x, module.weight) if whole else _strips(x, rows or (lambda at: module.weight[at]))
            return y if module.bias is None else y + module.bias.to(dtype)

    def _strips(x: Tensor, of: Rows) -> Tensor:
        count = module.weight.shape[0]
        if count <= STRIP:
            return nn.functional.linear(x, of(slice(0, count)).to(dtype))
        strips = (slice(start, min(start + STRIP, count)) for start in range(0, count, STRIP))
        if torch.is_grad_enabled():
            return torch.cat([nn.functional.linear(x, of(at).to(dtype)) for at in strips], -1)
        y = torch.empty(*x.shape[:-1], count, dtype=dtype, device=x.device)
        for at in strips:
            y[..., at] = nn.functional.linear(x, of(at).to(dtype))
        return y

    return forward
