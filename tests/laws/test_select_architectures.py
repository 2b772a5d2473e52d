"""Pruning on every architecture of the list: taking out neurons or heads is the same as reading nothing from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regauge.anatomy.model import Anatomy, Stream, Weights
from regauge.anatomy.moves import Move, apply, transform
from tests.architectures import every, in_float64
from tests.laws.test_moves_architectures import LIMIT, output


def muted(weights: Weights, stream: Stream, kept: torch.Tensor) -> Weights:
    """The weights with zeros where readers of the stream read what is taken out."""
    found = dict(weights)
    for port in stream.readers:
        if port.tensor in found:
            part = found[port.tensor].clone()
            gone = torch.ones(stream.size, dtype=torch.bool).index_fill(0, kept, False)
            part.narrow(port.axis, port.start, stream.size * port.width)[..., gone.repeat_interleave(port.width)] = 0
            found[port.tensor] = part
    return found


def chosen(anatomy: Anatomy, kind: str) -> dict[str, torch.Tensor]:
    """Of each stream of a kind that can be cut, half of its channels, alike for all."""
    streams = [s for s in anatomy.streams if s.kind == kind and "select" in s.admits and s.size > 1]
    return {s.name: torch.arange(s.size)[:: 2 if s.size > 2 else 1][: max(1, s.size // 2)] for s in streams}


@pytest.mark.parametrize("name", every())
def test_what_is_taken_out_is_as_if_nothing_read_it(name: str, tmp_path: Path) -> None:
    source, given, weights = in_float64(name, tmp_path)
    anatomy = source.anatomy
    for kind in ("ffn", "heads"):
        kept = chosen(anatomy, kind)
        moves = [Move("select", stream, index) for stream, index in kept.items()]
        if not moves:
            continue
        quiet = dict(weights)
        for stream, index in kept.items():
            quiet = {block: muted(some, anatomy.stream(stream), index) for block, some in quiet.items()}
        cut = {block: apply(moves, anatomy, some) for block, some in weights.items()}
        found = output(source, transform(moves, anatomy), cut, given)
        wanted = output(source, anatomy, quiet, given)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < LIMIT, kind
