"""Schemes and tokens for tests of packed stores."""

from __future__ import annotations

import torch
from torch import Tensor

from regauge.cache.scheme import BlockCache, CachePlan, Scheme
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


def plan_of(scheme: Scheme, blocks: int) -> CachePlan:
    """Every block by one scheme."""
    return CachePlan("test", (BlockCache(scheme),) * blocks)


def coded(x_BHTD: Tensor, fmt: Format | None, sealed: int, hadamard: bool) -> Tensor:
    """The first tokens as they come back from their codes: by formulas written here, for whatever was seen."""
    if fmt is None or not sealed:
        return x_BHTD
    size, bits = x_BHTD.shape[-1], fmt.grid.bits
    turn_DD = _sylvester(size) if hadamard else torch.eye(size)
    x = x_BHTD[:, :, :sealed].float() @ turn_DD
    grain = str(fmt.grain.name)
    if grain.startswith("time"):
        groups, axis = x.unflatten(2, (-1, int(grain.partition(":")[2]))), 3
    else:
        groups, axis = x.unflatten(3, (-1, size if grain == "token" else int(grain.partition(":")[2]))), 4
    if fmt.grid.symmetric:
        step = (groups.abs().amax(axis, keepdim=True) / ((2**bits - 1) / 2)).half().float()
        back = (groups / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    else:
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        step, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
        back = ((groups - low) / step).round().clamp(0, 2**bits - 1) * step + low
    back = back.reshape(x.shape) @ turn_DD.T
    return torch.cat((back.to(x_BHTD.dtype), x_BHTD[:, :, sealed:]), 2)


def _sylvester(size: int) -> Tensor:
    turn = torch.ones(1, 1)
    while turn.shape[0] < size:
        turn = torch.cat((torch.cat((turn, turn), 1), torch.cat((turn, -turn), 1)))
    return turn / size**0.5
