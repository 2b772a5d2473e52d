"""Whether a format can cut a matrix, its grid's runs of weights included."""

from __future__ import annotations

from regauge.formats.base import Format


def refusal(fmt: Format, shape: tuple[int, int]) -> str | None:
    """Why a matrix of this shape (O, I) cannot have this format, or None."""
    reason = fmt.grain.refuses(shape)
    if reason is not None or fmt.grid.run == 1:
        return reason
    run, span = fmt.grid.run, fmt.grain.span(shape)
    if shape[1] % run:
        return f"{fmt.grid.name} rounds runs of {run} weights, which do not divide a width of {shape[1]}"
    if span % run:
        return f"{fmt.grid.name} rounds runs of {run} weights, which do not divide groups of {span}"
    return None
