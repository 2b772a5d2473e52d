"""Random moves for the laws: any admitted kind, with a value that suits it."""

from __future__ import annotations

import random

from regauge.anatomy.drawing import EXACT, admitted, draw_value, orthogonal
from regauge.anatomy.model import Anatomy
from regauge.anatomy.moves import Move, check, transform

__all__ = ["EXACT", "admitted", "draw_moves", "draw_value", "orthogonal"]


def draw_moves(anatomy: Anatomy, rng: random.Random, count: int) -> list[Move]:
    """A sequence that stays admitted while the anatomy changes under it; kinds are drawn evenly, then streams."""
    moves: list[Move] = []
    for _ in range(count):
        options = admitted(anatomy)
        kind = rng.choice(sorted({kind for _, kind in options}))
        stream = rng.choice([s for s, k in options if k == kind])
        moves.append(Move(kind, stream.name, draw_value(anatomy, stream, kind, rng.randrange(2**31))))
        check(anatomy, moves[-1])
        anatomy = transform(moves[-1:], anatomy)
    return moves
