"""The laws of moves on every architecture of the list: what its table admits does not change what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Weights
from regauge.anatomy.moves import Move, apply, transform
from regauge.hosts.precise import precise
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source
from tests.architectures import every, in_float64
from tests.moving import admitted, draw_value

LIMIT = 1e-10


def output(source: Source, anatomy: Anatomy, weights: dict[int | None, Weights], given: dict[str, Tensor]) -> Tensor:
    with precise(), torch.no_grad():
        runner = Runner(source, anatomy, dtype=torch.float64, attention="eager")
        return next(iter(runner.logits([given], lambda block: weights[block])))


@pytest.mark.parametrize("name", every())
def test_every_kind_of_move_that_is_admitted_keeps_the_output(name: str, tmp_path: Path) -> None:
    """All admitted moves of one kind at once, on every stream, in float64 all the way."""
    source, given, weights = in_float64(name, tmp_path)
    anatomy = source.anatomy
    before = output(source, anatomy, weights, given)
    for kind in sorted({kind for _, kind in admitted(anatomy)}):
        streams = [stream for stream, k in admitted(anatomy) if k == kind]
        moves = [Move(kind, s.name, draw_value(anatomy, s, kind, i)) for i, s in enumerate(streams)]
        moved = {block: apply(moves, anatomy, some) for block, some in weights.items()}
        after = output(source, transform(moves, anatomy), moved, given)
        change = float((after - before).abs().max() / before.abs().max())
        assert change < LIMIT, (kind, change, [stream.name for stream in streams][:8])
