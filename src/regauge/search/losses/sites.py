"""Sites of a block rounded together: those that read one activation, in one go, and side by side with all others.

Error feedback goes column by column, some microseconds a column however few the rows are, so rows of several matrices
with one XᵀX are stacked where their formats let rows stand alone.
Legend: O output channels, I input channels, R rows of a sample, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Site, Weights
from regauge.engine.statistics import Collection, collection
from regauge.formats.base import Codes, Step
from regauge.hosts.base import Rows
from regauge.rounding.base import Stats
from regauge.rounding.pieces import PIECE, alone, pieces
from regauge.rounding.together import side_by_side
from regauge.search.options import Option, SiteGroup

ROWS = 256
"""Rows of a matrix that are tried; all where it has no more."""
Wanted = Sequence[tuple[SiteGroup, Option]]
Finish = Callable[[Site, Option, Codes, slice], dict[str, Tensor]]
"""What is kept of the codes of some rows of a site, as soon as they are there; it is joined over all rows."""


def watching(wanted: Wanted) -> Collection:
    """Collectors of what the rounders of some options need to have seen."""
    needs: dict[str, frozenset[str]] = {}
    sites: dict[str, Site] = {}
    for group, option in wanted:
        for site in group.sites if option.choice is not None else ():
            needs[site.name] = needs.get(site.name, frozenset()) | parts.rounder_of(option.choice).needs  # type: ignore[arg-type]  # not None
            sites[site.name] = site
    return collection(sites.values(), {name: need for name, need in needs.items() if need})


def rounded(
    wanted: Wanted, weights: Weights, stats: Mapping[str, Stats], finish: Finish, at_once: int | None = None
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(site, option name) → what `finish` makes of its codes, of whole matrices.

    Args:
        at_once: how many matrices, or pieces of large ones, are rounded at the same time; None: a thread each.
    """
    return _rounded(wanted, lambda site: weights[f"{site.name}.weight"], stats, finish, at_once)


@dataclass(frozen=True, eq=False)
class Tried:
    """Some rows of a site, rounded to each of its options.

    Attributes:
        rows: which rows (R,); None: all.
        weight: by how much what they lose is less than what all rows lose: O / R.
        deltas: option → Ŵ − W of those rows (R, I), float32.
    """

    rows: Tensor | None
    weight: float
    deltas: Mapping[str, Tensor]

    def pulls(self, x_nI: Tensor, g_nO: Tensor) -> dict[str, Tensor]:
        """Option → Σ over the rows of g · ΔW x, a token each (n,), scaled so that its square counts for all rows."""
        g_nR = g_nO if self.rows is None else g_nO[:, self.rows]
        stack_KI = torch.cat(list(self.deltas.values())).to(x_nI.dtype)
        found = []
        for x, g in zip(torch.split(x_nI, 1024), torch.split(g_nR, 1024), strict=True):
            y_nKR = (x @ stack_KI.T).view(len(x), len(self.deltas), -1)
            found.append(torch.einsum("nkr,nr->nk", y_nKR.float(), g.float()))
        pulls_nK = torch.cat(found).mul_(self.weight**0.5)
        return dict(zip(self.deltas, pulls_nK.unbind(1), strict=True))

    def spread(self, x_nI: Tensor) -> dict[str, float]:
        """Option → E over tokens and rows of (ΔW x)²."""
        return {
            name: float((x_nI @ delta_RI.to(x_nI.dtype).T).float().square().mean(dtype=torch.float64))
            for name, delta_RI in self.deltas.items()
        }

    def weights(self, weight_OI: Tensor, option: str) -> Tensor:
        """The matrix with those rows rounded, in its own dtype."""
        changed_OI, delta_RI = weight_OI.clone(), self.deltas[option]
        rows = torch.arange(len(delta_RI), dtype=torch.int64, device="cpu") if self.rows is None else self.rows
        changed_OI[rows] = (weight_OI[rows].float() + delta_RI).to(weight_OI.dtype)
        return changed_OI

    def lookup(self, weight_OI: Tensor, option: str) -> Rows:
        """What makes rows of the matrix with those rows rounded; of indices, only ones that were rounded."""
        delta_RI, rows_R = self.deltas[option], self.rows

        def make(which: Tensor | slice) -> Tensor:
            if type(which) is slice:
                return self.weights(weight_OI, option)[which]
            places = which if rows_R is None else torch.searchsorted(rows_R, which)
            return (weight_OI[which].float() + delta_RI[places]).to(weight_OI.dtype)

        return make


def tried(
    groups: Iterable[SiteGroup],
    weights: Weights,
    stats: Mapping[str, Stats],
    rows: Mapping[str, Tensor] | None = None,
    at_once: int | None = None,
) -> dict[str, Tried]:
    """Site → some of its rows, rounded to every option.

    Args:
        at_once: how many matrices are rounded at the same time; None: a thread each.
        rows: which rows, of sites where that is not left to us.
    """
    wanted = [(group, option) for group in groups for option in group.options if option.choice is not None]
    picked = {site.name: _rows(site, group, rows or {}) for group, _ in wanted for site in group.sites}
    taken: dict[str, Tensor] = {}
    for name, index_R in picked.items():
        w_OI = weights[f"{name}.weight"]
        taken[name] = w_OI.float() if index_R is None else w_OI[index_R].float()

    def delta(site: Site, option: Option, codes: Codes, rows: slice) -> dict[str, Tensor]:
        assert option.choice is not None, "it has codes"
        return {"": parts.format_of(option.choice).decode(codes).sub_(taken[site.name][rows])}

    deltas: dict[str, dict[str, Tensor]] = {name: {} for name in taken}
    for (name, option_name), kept in _rounded(wanted, lambda site: taken[site.name], stats, delta, at_once).items():
        deltas[name][option_name] = kept[""]
    sizes = {site.name: site.shape[0] for group, _ in wanted for site in group.sites}
    return {name: Tried(picked[name], sizes[name] / len(taken[name]), deltas[name]) for name in taken}


def _rows(site: Site, group: SiteGroup, given: Mapping[str, Tensor]) -> Tensor | None:
    """Evenly spaced rows of a site; None: all, where some format does not let rows stand alone."""
    formats = [parts.format_of(option.choice) for option in group.options if option.choice is not None]
    if not all(alone(fmt, site.shape) for fmt in formats):
        return None
    if site.name in given:
        return given[site.name]
    if site.shape[0] <= ROWS:
        return None
    count = ROWS
    return torch.arange(count, dtype=torch.int64, device="cpu") * site.shape[0] // count


def _rounded(
    wanted: Wanted,
    weight: Callable[[Site], Tensor],
    stats: Mapping[str, Stats],
    finish: Finish,
    at_once: int | None = None,
) -> dict[tuple[str, str], dict[str, Tensor]]:
    stacks: dict[tuple[object, ...], list[tuple[Site, Option]]] = {}
    for group, option in wanted:
        assert option.choice is not None, "full precision is not rounded"
        fmt = parts.format_of(option.choice)
        for site in group.sites:
            mine = site.tap is not None and site.expert is None and alone(fmt, site.shape)
            mine = mine and site.shape[0] * site.shape[1] < PIECE
            key = (site.tap, option.name, option.choice) if mine else (site.name, option.name)
            stacks.setdefault(key, []).append((site, option))
    order, met = list(stacks.values()), set[str | None]()
    order.sort(key=lambda some: -sum(site.shape[0] * site.shape[1] ** 2 for site, _ in some))
    first = []  # one of each activation, so that no factor is waited for by two
    for some in order:
        if some[0][0].tap not in met:
            met.add(some[0][0].tap)
            first.append(some)
    order = first + [some for some in order if not any(some is other for other in first)]
    jobs = [
        _stack(some, weight, stats, finish, rows) for some in order for rows in _pieces(some, len(weight(some[0][0])))
    ]
    kept: dict[tuple[str, str], list[dict[str, Tensor]]] = {}
    for found in side_by_side(jobs, at_once):
        for site, option, one in found:
            kept.setdefault((site.name, option.name), []).append(one)
    return {at: some[0] if len(some) == 1 else _joined(some) for at, some in kept.items()}


def _joined(some: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in some]) for name in some[0]}


def _pieces(some: Sequence[tuple[Site, Option]], rows: int) -> list[slice]:
    """The rows that are rounded at a time: all of a stack; of a large matrix whose rows stand alone, some."""
    (site, option), *others = some
    assert option.choice is not None, "full precision is not rounded"
    return [slice(None)] if others else pieces(parts.format_of(option.choice), (rows, site.shape[1]))


def _stack(
    some: Sequence[tuple[Site, Option]],
    weight: Callable[[Site], Tensor],
    stats: Mapping[str, Stats],
    finish: Finish,
    rows: slice,
) -> Callable[[], list[tuple[Site, Option, dict[str, Tensor]]]]:
    def job() -> list[tuple[Site, Option, dict[str, Tensor]]]:
        choice = some[0][1].choice
        assert choice is not None, "full precision is not rounded"
        fmt, rounder, seen = parts.format_of(choice), parts.rounder_of(choice), stats.get(some[0][0].name, {})
        matrices = [weight(site)[rows] for site, _ in some]
        w_OI = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        codes = _split(rounder(w_OI, fmt, seen), [len(one) for one in matrices])
        return [(*one, finish(*one, own, rows)) for one, own in zip(some, codes, strict=True)]

    return job


def _split(codes: Codes, sizes: Sequence[int]) -> list[Codes]:
    """The codes of each of some matrices that were rounded as one."""
    if len(sizes) == 1:
        return [codes]
    rows, step = sum(sizes), codes.step

    def cut(tensor: Tensor, start: int, count: int) -> Tensor:
        each = tensor.shape[0] // rows
        return tensor[start * each : (start + count) * each]

    found, start = [], 0
    for count in sizes:
        part = Step(
            cut(step.scale_G1, start, count),
            None if step.zero_G1 is None else cut(step.zero_G1, start, count),
            {name: cut(tensor, start, count) for name, tensor in step.fields.items()},
        )
        found.append(replace(codes, codes_OI=codes.codes_OI[start : start + count], step=part))
        start += count
    return found
