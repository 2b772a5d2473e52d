"""Random moves for the laws: any admitted kind, with a value that suits it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream
from regauge.anatomy.moves import Move, check, transform
from regauge.anatomy.values import pairs

EXACT = ("scale", "shift", "rotate", "affine", "permute", "centre", "fold")


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


def admitted(anatomy: Anatomy) -> list[tuple[Stream, str]]:
    return [(s, kind) for s in anatomy.streams for kind in sorted(s.admits) if kind in EXACT]


def draw_value(anatomy: Anatomy, stream: Stream, kind: str, seed: int) -> Tensor | None:
    """A random value that the stream admits, kept within a factor of a few so that rounding stays rounding."""
    g = torch.Generator().manual_seed(seed)
    n, condition = stream.size, stream.admits[kind]
    first, second = pairs(anatomy.plumbing)
    if kind == "scale":
        s = 0.5 + torch.rand(n, generator=g, dtype=torch.float64)
        if condition == "pairs":
            s[second] = s[first]
        sign = torch.randint(0, 2, (n,), generator=g) * 2 - 1
        return s * sign if condition == "nonzero" else s
    if kind == "shift":
        return torch.randn(n, generator=g, dtype=torch.float64)
    if kind == "permute":
        fixed = anatomy.plumbing.rotary if condition == "free" else 0
        return torch.cat([torch.arange(fixed), fixed + torch.randperm(n - fixed, generator=g)])
    if kind in ("rotate", "affine"):
        q = orthogonal(n, g)
        if condition == "pairs":
            r = anatomy.plumbing.rotary
            q = torch.zeros(n, n, dtype=torch.float64)
            if n > r:
                q[r:, r:] = orthogonal(n - r, g)
            angle = 6.0 * torch.rand(len(first), generator=g, dtype=torch.float64)
            q[first, first] = q[second, second] = angle.cos()
            q[second, first], q[first, second] = angle.sin(), -angle.sin()
        if kind == "affine":
            scale = 0.5 + torch.rand(n, generator=g, dtype=torch.float64)
            scale[second] = scale[first] if condition == "pairs" else scale[second]
            q = q * scale
        return q
    return None


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
