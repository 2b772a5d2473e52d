"""Schemes and tokens for tests of packed stores."""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.cache.scheme import Scheme
from regauge.formats.base import Format, Grain
from regauge.formats.grains import Group, Time, Token
from regauge.formats.grids import E4M3, Int
from regauge.formats.offsets import Ends
from regauge.formats.scales import Float16

HEADS, SIZE = 3, 24


def tokens(count: int, batch: int = 2, seed: int = 0, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Keys and values (B, 3, count, size), with a channel of a large bias and one of large spread in the keys."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, HEADS, count, size, generator=draw) for _ in range(2))
    keys[..., 1] += 40
    keys[..., 3] *= 9
    return keys, values


def asymmetric(bits: int, grain: Grain) -> Format:
    """Integers with a low beside each step."""
    return Format(Int(bits, symmetric=False), grain, Ends(), Float16())


def symmetric(bits: int, grain: Grain) -> Format:
    """Integers around 0."""
    return Format(Int(bits), grain, Ends(), Float16())


def kivi(bits: int, window: int = 40, group: int = 8) -> Scheme:
    """Keys by channel over 32 tokens, values by token over groups of channels."""
    return Scheme(asymmetric(bits, Time(32)), asymmetric(bits, Group(group)), window)


SCHEMES = {
    "kivi-2": kivi(2),
    "kivi-4": kivi(4),
    "kv8": Scheme(symmetric(8, Token()), symmetric(8, Token())),
    "fp8": Scheme(Format(E4M3(), Token(), Ends(), Float16()), Format(E4M3(), Token(), Ends(), Float16()), 5),
    "rotated-4": Scheme(asymmetric(4, Time(16)), asymmetric(4, Token()), 33, hadamard=True),
    "balanced": Scheme(asymmetric(4, Time(64)), asymmetric(2, Time(64)), 16, hadamard=True, balance=4),
    "keys alone": Scheme(asymmetric(3, Time(32)), None, 7),
    "values alone": Scheme(None, asymmetric(1, Group(12)), 0),
}
