"""Several ranges, of which each row of a matrix keeps the one that leaves its outputs the least error.

Rows are rounded apart from each other, error feedback and all, so the best range of a row is found by rounding it with
each. A shrunk range has finer steps and clips the ends: how much of that feedback makes good no rule of the weights
alone tells, which is why a range searched for the least error of the weights does worse under feedback than the whole.

Legend: O output channels, I input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Step

LEAST = 0.8
"""The smallest share of a range that is tried."""
WIDE = 1.6
"""The largest that is tried where words are rounded: what columns pay for others spreads them, and a code book ends."""
WIDEST = 4
"""Bits of a grid up to which shrinking pays: with more, clipping costs what finer steps gain."""


def shares(tries: int, fmt: Format, shape: tuple[int, int]) -> tuple[float, ...]:
    """Shares of the range that are tried, of single weights the whole first. One where there is no choice of a row.

    That is: its step is known (learnt), steps of several rows depend on each other, or the grid is fine.
    """
    span = fmt.grain.span(shape)
    alone = fmt.grain.groups(shape) == (shape[0] * shape[1] // span, span) and not fmt.scale.shared
    if tries < 2 or fmt.step is not None or not alone or fmt.grid.bits > WIDEST:
        return (1.0,)
    end = LEAST if fmt.grid.run == 1 else WIDE
    return tuple(1 + (end - 1) * index / (tries - 1) for index in range(tries))


def least(found: Iterable[Codes], w_OI: Tensor, fmt: Format, hessian_II: Tensor) -> Codes:
    """Of each row the codes with the least (w − ŵ) H (w − ŵ)ᵀ; the earlier where they are equal or not finite.

    Args:
        found: the same matrix rounded in several ways, with groups inside rows.

    Cost: O·I² a way.
    """
    best, best_O = None, None
    for codes in found:
        error_OI = w_OI - fmt.decode(codes).to(w_OI.dtype)
        error_O = ((error_OI @ hessian_II.to(w_OI.dtype)) * error_OI).sum(1)
        if best is None or best_O is None:
            best, best_O = codes, error_O
        else:
            wins_O = error_O < best_O
            best, best_O = _rows(wins_O, codes, best), torch.where(wins_O, error_O, best_O)
    assert best is not None, "at least one way"
    return best


def _rows(wins_O: Tensor, new: Codes, old: Codes) -> Codes:
    """Rows of one where it wins, of the other elsewhere; groups are numbered row by row."""

    def picked(a: Tensor, b: Tensor) -> Tensor:
        wins = wins_O.repeat_interleave(len(a) // len(wins_O))
        return torch.where(wins.view(-1, *[1] * (a.ndim - 1)), a, b)

    zeros = new.step.zero_G1, old.step.zero_G1
    zero_G1 = None if zeros[0] is None or zeros[1] is None else picked(zeros[0], zeros[1])
    fields = {name: picked(field, old.step.fields[name]) for name, field in new.step.fields.items()}
    step = Step(picked(new.step.scale_G1, old.step.scale_G1), zero_G1, fields)
    return Codes(picked(new.codes_OI, old.codes_OI), step)
