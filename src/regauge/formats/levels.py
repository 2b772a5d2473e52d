"""Numbers as integer codes under a float16 level that neighbours along a row share: super-blocks.

A level has no more significant bits than leave code · level exact in float16, so kernels that read float16 steps read
these, and nothing is rounded twice. That costs the codes a fraction of a bit of their range at most.

Legend: G groups, numbered row by row; R rows, N groups along a row, L levels along a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 11
"""Significant bits of float16."""
TRIED = tuple(0.85 + 0.025 * index for index in range(25))
"""Levels that are tried, over the one that brings the largest number to the last code."""


def cells(x_G1: Tensor, rows: int, run: int) -> Tensor:
    """(G, 1) → (R, L, run), float32, with zeros behind a row's last number. `run` 0: all of a row."""
    x_RN = x_G1.float().reshape(rows, -1)
    run = run or x_RN.shape[1]
    return torch.nn.functional.pad(x_RN, (0, -x_RN.shape[1] % run)).view(rows, -1, run)


def flat(x_RLn: Tensor, groups: int) -> Tensor:
    """The inverse: (R, L, run) → (G, 1)."""
    rows = x_RLn.shape[0]
    return x_RLn.reshape(rows, -1)[:, : groups // rows].reshape(-1, 1)


def count(groups: int, rows: int, run: int) -> int:
    """Levels of a matrix."""
    rows = rows if groups % rows == 0 else 1
    along = groups // rows
    return rows * -(-along // (run or max(along, 1)))


def levels(x_G1: Tensor, rows: int, run: int, bits: int, top: int, odd: bool = False) -> Tensor:
    """The level of every run (R, L), float16, positive: of some tried the one that leaves |x| the least squared error.

    Args:
        bits: of a code; top: the greatest code; odd: whether even codes are not there.
    """
    x_RLn = cells(x_G1.abs().nan_to_num(0.0, posinf=3e38), rows if x_G1.shape[0] % rows == 0 else 1, run)
    widest = torch.finfo(torch.float16).max / (1 << bits)
    most_RL = (x_RLn.amax(2) / top).clamp(2.0**-24, widest)
    best_RL = _few(most_RL, EXACT - bits)
    error_RL = torch.full_like(best_RL, torch.inf)
    for share in TRIED:
        level_RL = _few(most_RL * share, EXACT - bits)
        scaled = x_RLn / level_RL[:, :, None]
        missed = (scaled - whole(scaled, top, odd)) * level_RL[:, :, None]
        found_RL = missed.square_().sum(2)
        wins_RL = found_RL < error_RL
        best_RL, error_RL = torch.where(wins_RL, level_RL, best_RL), torch.where(wins_RL, found_RL, error_RL)
    return best_RL.half()


def whole(x: Tensor, top: int, odd: bool) -> Tensor:
    """The nearest code up to `top`, of odd ones alone where only they are there."""
    return (((x - 1) / 2).round().clamp(0, (top - 1) // 2) * 2 + 1) if odd else x.round().clamp(max=top)


def _few(x: Tensor, bits: int) -> Tensor:
    """Positive numbers of few significant bits that float16 has, near x."""
    fraction, exponent = torch.frexp(x)
    x = torch.ldexp((fraction * 2.0**bits).round(), exponent - bits)
    return x.half().float().clamp(min=2.0**-24)


def codes_of(x_G1: Tensor, level_RL: Tensor, run: int, low: int, high: int, odd: bool = False) -> Tensor:
    """The code of every number (G, 1), int32, from `low` to `high`; where `odd`, c stands for 2c + 1 levels."""
    x_RLn = cells(x_G1.nan_to_num(0.0), level_RL.shape[0], run)
    scaled_RLn = x_RLn / level_RL.float()[:, :, None]
    if odd:
        scaled_RLn = (scaled_RLn - 1) / 2
    return flat(scaled_RLn.round().clamp(low, high), x_G1.shape[0]).int()


def numbers_of(codes_G1: Tensor, level_RL: Tensor, run: int) -> Tensor:
    """code · level (G, 1), float32."""
    return flat(cells(codes_G1, level_RL.shape[0], run) * level_RL.float()[:, :, None], codes_G1.shape[0])
