"""What a search will come to in quality, before it is made: the dry run's word.

The loss of a matrix goes with the relative error of its rounding (the linearity of HIGGS, 2411.17525, where each matrix
has its own factor; here those of the blocks have one, and embedding and head one each). The factors come from one
forward pass on some hundred tokens with all of them at about 4 bits; the allocation is the search's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch

from regauge.anatomy.model import Weights
from regauge.engine.foresight import GAINS, Foresight, Lost, nearest, to_nearest, tokens, told, unforeseen
from regauge.errors import RegaugeError
from regauge.hosts.base import Source
from regauge.parts import Point
from regauge.search.allocation import Allocation, Bound, Candidate, allocate, knee, sizes, span, sweep
from regauge.search.loop.desk import Ask
from regauge.search.options import Option, SiteGroup, group_bytes
from regauge.search.profile import timed

ROWS = 32
"""Rows of a matrix whose error stands for all."""
Errors = dict[str, dict[str, float]]
"""Group → option → relative squared error of rounding to nearest."""


def outlook(source: Source, groups: Sequence[SiteGroup], ask: Ask, fixed: float) -> Foresight:
    """What the point that a search aims at will cost.

    Args:
        fixed: bytes that no choice changes.
    """
    if why := unforeseen(source):
        return Foresight.nothing(why)
    if timed(ask.budgets):
        return Foresight.nothing("what a speed costs is known once the machine is timed")
    if any(group.store is not None for group in groups):
        return Foresight.nothing("the cache is chosen too, and what it costs is known once attention reads it")
    if ask.floors:
        return Foresight.nothing("a floor is kept by measurement")
    try:
        ids_NT, text = tokens(source, ask.seed, None)
        errors = _errors(source, groups)
        losses, lost = _losses(source, groups, errors, ids_NT)
    except RegaugeError as error:
        return Foresight.nothing(f"the model could not be run ({error})")
    itemsize = source.dtype.itemsize
    candidates = [
        [
            Candidate(losses[group.name][option.name], {"bytes": float(group_bytes(group, option, itemsize))})
            for option in group.options
        ]
        for group in groups
    ]
    point = _aim(source, groups, candidates, ask, fixed)
    picked = [group.options[pick] for group, pick in zip(groups, point.picks, strict=True)]
    gains = [GAINS.get(option.choice.name("rounder"), 1.0) for option in picked if option.choice is not None]
    gain = sum(gains) / len(gains) if gains else 1.0
    changed = min(1.0, lost.changed * sqrt(point.loss / lost.kl)) if lost.kl else 0.0
    size = point.takes["bytes"] + fixed
    return told(
        Lost(point.loss, changed),
        gain,
        f"errors of rounding and a pass over {ids_NT.numel()} tokens {text}, at {size / source.bytes_bf16():.2f}x",
    )


def _aim(
    source: Source, groups: Sequence[SiteGroup], candidates: list[list[Candidate]], ask: Ask, fixed: float
) -> Allocation:
    """The point that a search aims at: the best in its budgets, or the knee."""
    whole = source.bytes_bf16()
    limits = [
        budget.beside(2 * source.anatomy.cached * (budget.context or 0), whole)
        for budget in ask.budgets
        if budget.resource == "memory"
    ]
    if limits:
        return allocate(candidates, [Bound("bytes", min(limits), fixed)], 1e-3)
    densest = [max(range(len(one.options)), key=lambda i, one=one: (one.options[i].bits <= 8, i)) for one in groups]  # type: ignore[misc]  # the default binds the loop's variable
    low, high = span(candidates, fixed, densest)
    points = sweep(candidates, sizes(low * 1.05, high, ask.effort.points), fixed)
    return points[knee([(one.takes["bytes"], one.loss) for one in points])]


def _losses(
    source: Source, groups: Sequence[SiteGroup], errors: Errors, ids_NT: torch.Tensor
) -> tuple[dict[str, dict[str, float]], Lost]:
    """Group → option → KL with nearest rounding; and what all of the blocks at about 4 bits cost."""
    together: dict[str, list[SiteGroup]] = {}
    for group in groups:
        together.setdefault("blocks" if group.block is not None else group.name, []).append(group)
    tried = {name: {one.name: _middle(one) for one in some} for name, some in together.items()}
    variants: list[dict[str, Point]] = [
        {
            site.name: point
            for group in some
            for site in group.sites
            if (point := tried[name][group.name].choice) is not None
        }
        for name, some in together.items()
    ]
    found = nearest(source, ids_NT, variants)
    losses: dict[str, dict[str, float]] = {}
    for (name, some), lost in zip(together.items(), found, strict=True):
        whole = sum(errors[group.name][tried[name][group.name].name] for group in some) or 1.0
        for group in some:
            losses[group.name] = {option: lost.kl * error / whole for option, error in errors[group.name].items()}
    return losses, max(found, key=lambda one: one.kl)


def _middle(group: SiteGroup) -> Option:
    """The option nearest to 4 bits."""
    return min((one for one in group.options if one.choice is not None), key=lambda one: abs(one.bits - 4))


@torch.no_grad()
def _errors(source: Source, groups: Sequence[SiteGroup]) -> Errors:
    found: Errors = {}
    for block in (None, *range(source.anatomy.blocks)):
        weights: Weights = source.block(block)
        for group in groups:
            if group.block == block:
                w_OI = weights[f"{group.sites[0].name}.weight"]
                rows = torch.arange(min(ROWS, len(w_OI)), dtype=torch.int64, device="cpu") * len(w_OI)
                w_RI = w_OI[rows // min(ROWS, len(w_OI))].float()
                power = float(w_RI.square().sum()) or 1.0
                found[group.name] = {
                    option.name: 0.0
                    if option.choice is None
                    else float((to_nearest(w_RI, option.choice) - w_RI).square().sum()) / power
                    for option in group.options
                }
    return found
