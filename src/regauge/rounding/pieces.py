"""Large matrices rounded some rows at a time, so that no more than a piece is held in float32.

A rounder bears on each row by itself (error feedback runs along it, with one factor for all), so where each row has
steps of its own the codes are those of the whole. Pieces are whole numbers of the rows that a sweep takes together.
Legend: O output channels, I input channels, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regauge.formats.base import Codes, Format, Step
from regauge.rounding.base import Stats

PIECE = 1 << 23
"""Weights of a matrix that are rounded at a time, where its rows stand alone: a head may have sixty times as many."""
ROWS = 1024
"""Rows of a piece are a multiple of this, where it has as many."""

Rounder = Callable[[Tensor, Format, Stats], Codes]


def alone(fmt: Format, shape: tuple[int, int]) -> bool:
    """Whether each row has steps of its own, which no other row bears on."""
    return fmt.step is None and not fmt.scale.shared and fmt.grain.groups(shape)[1] == fmt.grain.span(shape)


def pieces(fmt: Format, shape: tuple[int, int]) -> list[slice]:
    """The rows that are rounded at a time: all, or of a large matrix whose rows stand alone some."""
    rows, inputs = shape
    if rows * inputs <= PIECE or not alone(fmt, shape):
        return [slice(0, rows)]
    step = max(1, PIECE // inputs)
    step = step // ROWS * ROWS or step
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def piecewise(rounder: Rounder, w_OI: Tensor, fmt: Format, stats: Stats) -> Codes:
    """Codes of a matrix, as `rounder(w_OI, fmt, stats)` gives them."""
    some = pieces(fmt, (w_OI.shape[0], w_OI.shape[1]))
    if len(some) == 1:
        return rounder(w_OI, fmt, stats)
    return joined([rounder(w_OI[rows], fmt, stats) for rows in some])


def of_rows(codes: Codes, which: Tensor | slice) -> Codes:
    """The codes of some rows of a matrix whose rows have steps of their own."""
    outputs, step = len(codes.codes_OI), codes.step

    def cut(tensor: Tensor) -> Tensor:
        return tensor.view(outputs, len(tensor) // outputs, *tensor.shape[1:])[which].flatten(0, 1)

    zero = None if step.zero_G1 is None else cut(step.zero_G1)
    some = Step(cut(step.scale_G1), zero, {name: cut(tensor) for name, tensor in step.fields.items()})
    return replace(codes, codes_OI=codes.codes_OI[which], step=some)


def joined(found: Sequence[Codes]) -> Codes:
    """The codes of a matrix whose rows were rounded piece by piece."""
    steps = [codes.step for codes in found]
    zeros = [step.zero_G1 for step in steps if step.zero_G1 is not None]
    step = Step(
        torch.cat([step.scale_G1 for step in steps]),
        torch.cat(zeros) if zeros else None,
        {name: torch.cat([step.fields[name] for step in steps]) for name in steps[0].fields},
    )
    notes = tuple(dict.fromkeys(note for codes in found for note in codes.notes))
    return replace(found[0], codes_OI=torch.cat([codes.codes_OI for codes in found]), step=step, notes=notes)
