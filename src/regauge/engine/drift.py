"""How far the inputs of a block have moved from the uncompressed model's: E[(x − x̂) x̂ᵀ] of each tap.

x̂ is what the compressed model feeds a site and x what the uncompressed one does, of the same tokens. Each batch is run
in both streams before the next, so that no more than one batch of either is held.
Cost: the block once more in each stream, T·I² multiply-adds and 8·I² bytes a tap. Legend: T tokens, I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from regauge.anatomy.model import Site
from regauge.hosts.states import States
from regauge.rounding.base import DRIFT, Stats

Watch = Mapping[str, Callable[[Tensor], None]]


def readers(sites: Sequence[Site], needs: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Site → tap, one site of each tap whose drift is wanted. Experts have none: which tokens reach them may differ."""
    found: dict[str, str] = {}
    for site in sites:
        wanted = DRIFT in needs.get(site.name, ()) and site.expert is None
        if wanted and site.tap is not None and site.tap not in found.values():
            found[site.name] = site.tap
    return found


def drifts(
    taps: Mapping[str, str], bind: Callable[[Watch], Callable[[Tensor, int], Tensor]], theirs: States, ours: States
) -> dict[str, Tensor]:
    """Tap → E[(x − x̂) x̂ᵀ], (I, I) float64, x and x̂ as columns.

    Args:
        taps: site → the tap that it reads.
        bind: the block as a function of states and batch number, shown to some watchers.
        theirs: the uncompressed model's states before the block; ours: the compressed one's.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in taps}

    def keeper(name: str) -> Callable[[Tensor], None]:
        return lambda x_TI: seen[name].append(x_TI.detach().float())

    run = bind({name: keeper(name) for name in taps})
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(taps, 0)
    for batch, (exact_BTD, own_BTD) in enumerate(zip(theirs.hidden, ours.hidden, strict=True)):
        with torch.no_grad():
            run(exact_BTD, batch)
            before = {name: torch.cat(some) for name, some in seen.items()}
            for some in seen.values():
                some.clear()
            run(own_BTD, batch)
        for name, some in seen.items():
            x_TI = torch.cat(some)
            drift_II = ((before[name] - x_TI).T @ x_TI).double()
            sums[name] = sums[name] + drift_II if name in sums else drift_II
            counts[name] += len(x_TI)
            some.clear()
    return {tap: sums[name] / max(counts[name], 1) for name, tap in taps.items()}


def joined(stats: Mapping[str, Stats], sites: Sequence[Site], found: Mapping[str, Tensor]) -> dict[str, Stats]:
    """The statistics of sites with the drift of the taps that they read."""
    taps = {site.name: site.tap or "" for site in sites}
    return {name: {**seen, DRIFT: found[taps[name]]} if taps[name] in found else seen for name, seen in stats.items()}
