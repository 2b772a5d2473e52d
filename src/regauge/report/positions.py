"""How far rotated products drift from relative, by block and by how far a text is moved: `regauge inspect --positions`.

Queries and keys of the original model on a few random tokens, in float32, as its first positions turn them; turned back
in float64, and turned again at other positions as bfloat16 does it. Cost: one pass of the model over those tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.attention.rotary import Drift, Turning, drift
from regauge.errors import ModelError
from regauge.hosts import host_of
from regauge.hosts.base import MAPS

SHIFTS = (1024, 4096, 16384, 65536)
"""Positions that the text is moved by."""
TOLD = (
    "bf16 products of queries and keys beside those of the same text at position 0: |change| on 24 random tokens. A "
    "measure that repairs nothing; whoever trains on packed texts can mask them with an anchor "
    "(regauge.attention.forms.anchored)."
)


@dataclass(frozen=True)
class BlockDrift:
    """One block's drift, a `Drift` for each of `SHIFTS`."""

    block: int
    drifts: tuple[Drift, ...]


def positions(model: str, revision: str | None = None, seed: int = 0) -> tuple[BlockDrift, ...]:
    """The drift of every block.

    Raises:
        ModelError: the model turns no queries and keys by position, or not in a way that is known here.
    """
    host = host_of(model)
    source = host.open(model, revision)
    turning = host.turning(source)
    if turning is None:
        raise ModelError(
            f"a {source.anatomy.family} turns no queries and keys by their position in a way that is known here, so "
            "there is nothing to measure; leave --positions out"
        )
    seen: list[tuple[Tensor, Tensor]] = []
    found = []
    with host.maps(lambda _, query, key: seen.append((query, key))):
        runner = host.runner(source, attention=MAPS)
        states = runner.begin(host.probe(source, seed), source.block(None))
        for block in range(source.anatomy.blocks):
            seen.clear()
            states = runner.block(block, source.block(block), states)
            if not seen:
                raise ModelError(f"a {source.anatomy.family} attends in a way of its own, and nobody sees its products")
            found.append(BlockDrift(block, _drifts(*seen[0], turning)))
    return tuple(found)


def _drifts(query_BHTD: Tensor, key_BKTD: Tensor, turning: Turning) -> tuple[Drift, ...]:
    back_T = -torch.arange(query_BHTD.shape[2], dtype=torch.int64, device=query_BHTD.device)
    plain = [turning(x, back_T, torch.float64).float() for x in (query_BHTD, key_BKTD)]
    scale = query_BHTD.shape[-1] ** -0.5
    return tuple(drift(plain[0], plain[1], turning, shift, scale) for shift in SHIFTS)
