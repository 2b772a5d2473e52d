"""Random moves that a model admits: what its family's table is held to, and what the laws are tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.anatomy.model import Anatomy, Stream
from regauge.anatomy.values import pairs

EXACT = ("scale", "shift", "rotate", "affine", "permute", "centre", "fold")
"""Kinds of moves that change no output; `select` takes something out."""


def admitted(anatomy: Anatomy) -> list[tuple[Stream, str]]:
    """Every stream with every kind of exact move that it admits."""
    return [(s, kind) for s in anatomy.streams for kind in sorted(s.admits) if kind in EXACT]


def draw_value(anatomy: Anatomy, stream: Stream, kind: str, seed: int) -> Tensor | None:
    """A random value that the stream admits, float64 or int64, within a factor of a few so that rounding stays
    rounding; None for kinds that take none."""
    g = torch.Generator().manual_seed(seed)
    n, condition = stream.size, stream.admits[kind]
    first, second = pairs(anatomy.plumbing)
    if kind == "scale":
        s = 0.5 + torch.rand(n, generator=g, dtype=torch.float64, device="cpu")
        if condition == "pairs":
            s[second] = s[first]
        sign = torch.randint(0, 2, (n,), generator=g, dtype=torch.int64, device="cpu") * 2 - 1
        return s * sign if condition == "nonzero" else s
    if kind == "shift":
        return torch.randn(n, generator=g, dtype=torch.float64, device="cpu")
    if kind == "permute":
        fixed = anatomy.plumbing.rotary if condition == "free" else 0
        order = torch.randperm(n - fixed, generator=g, dtype=torch.int64, device="cpu")
        return torch.cat([torch.arange(fixed, dtype=torch.int64, device="cpu"), fixed + order])
    if kind in ("rotate", "affine"):
        return _matrix(anatomy, n, kind, condition == "pairs", g)
    return None


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 (n, n)."""
    q: Tensor = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu"))[0]
    return q


def _matrix(anatomy: Anatomy, n: int, kind: str, paired: bool, g: torch.Generator) -> Tensor:
    first, second = pairs(anatomy.plumbing)
    q = orthogonal(n, g)
    if paired:
        r = anatomy.plumbing.rotary
        q = torch.zeros(n, n, dtype=torch.float64, device="cpu")
        if n > r:
            q[r:, r:] = orthogonal(n - r, g)
        angle = 6.0 * torch.rand(len(first), generator=g, dtype=torch.float64, device="cpu")
        q[first, first] = q[second, second] = angle.cos()
        q[second, first], q[first, second] = angle.sin(), -angle.sin()
    if kind == "affine":
        scale = 0.5 + torch.rand(n, generator=g, dtype=torch.float64, device="cpu")
        if paired:
            scale[second] = scale[first]
        q = q * scale
    return q
