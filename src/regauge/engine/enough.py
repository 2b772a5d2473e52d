"""As many tokens as it takes: calibration text is read until more of it no longer changes what is rounded.

Error feedback learns XᵀX from the text, and past some length more text moves no weight to a better code. How long that
is depends on the width of the model, on its activations, and on the formats, so it is tried on the first block: its
sites (some rows of each) are rounded with XᵀX of 4,096 tokens, of twice as many, and so on, and each result is judged
on text that was kept aside. Where a doubling takes less than `GAIN` off the output error, what is read is enough: what
all further doublings could still take off is then about as much again.

Bounds: never fewer than `LEAST` tokens nor more than the recipe says; of large models not more than what keeps one
pass below `WORK` multiply-adds, and 32,768 at least. A number that the user gives is taken as it is.
Cost: the first block on the tokens that are read; a factor of XᵀX and a few rows of error feedback a doubling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regauge import parts
from regauge.anatomy.model import Site, Weights
from regauge.artifact.staging import Staging
from regauge.engine.job import Job
from regauge.engine.watchdog import Clock
from regauge.engine.work import Pass
from regauge.formats.runs import refusal
from regauge.hosts.base import Runner
from regauge.parts import Point
from regauge.rounding.base import Stats
from regauge.rounding.feedback import forget
from regauge.rounding.together import side_by_side
from regauge.text.calibration import Calibration

LEAST = 4096
FLOOR = 32768
WORK = 3.6e13
GAIN = 0.01
ROWS = 256
NOTE = "tokens that are enough"
HESSIAN = frozenset({"hessian"})


def bound(parameters: int, recipe: int) -> int:
    """Tokens that are read at most of a model of so many parameters, where the recipe says `recipe`."""
    return min(recipe, max(FLOOR, 1 << int(math.log2(max(1.0, WORK / max(1, parameters))))))


@dataclass(frozen=True, eq=False)
class Tried:
    """A site of the first block, some rows of it, and what it reads.

    Attributes:
        seen: statistics of the text read so far; aside: of the text kept aside.
    """

    w_RI: Tensor
    choice: Point
    seen: Stats
    aside: Stats

    def loss(self) -> float:
        """Output energy lost on the text kept aside, by the codes that the text read gives."""
        fmt = parts.format_of(self.choice)
        error_RI = self.w_RI - fmt.decode(parts.rounder_of(self.choice)(self.w_RI, fmt, self.seen))
        return float(((error_RI @ self.aside["hessian"].float()) * error_RI).sum(dtype=torch.float64))


def enough(job: Job, windows: Calibration | None, staging: Staging, clock: Clock) -> Calibration | None:
    """The windows that are read, with a word on why so many; a resumed run finds what an earlier one chose."""
    if windows is None or windows.kind in ("images", "sound") or job.shaping is not None:
        return windows
    each = windows.inputs.shape[1]
    step = -(-LEAST // each)
    sites = [site for site in job.sites(0) if _learns(job, site)]
    if not sites or len(windows.inputs) < 3 * step:
        return windows
    kept = staging.notes.get(NOTE)
    told = kept if isinstance(kept, dict) else _try(job, windows.inputs, step, sites, clock)
    staging.note(NOTE, told)
    count = int(str(told["windows"]))
    why = {"enough": {"tokens": count * each, "offered": windows.tokens, "gains": told["gains"]}}
    return replace(windows, inputs=windows.inputs[:count], details={**windows.details, **why})


def _learns(job: Job, site: Site) -> bool:
    return site.expert in (None, 0) and "hessian" in job.needs.get(site.name, ()) and job.choices[site.name] is not None


def _try(job: Job, ids_NT: Tensor, step: int, sites: Sequence[Site], clock: Clock) -> dict[str, object]:
    """How many windows are enough, and what each doubling took off the error."""
    first = Pass(job, Calibration(ids_NT[:1], ""))
    assert first.runner is not None, "a plan that learns from text has a runner"
    weights, outer = first.read(0).exact, first.read(None)
    looked = _Look(job, first.runner, outer.stored, weights, sites)
    aside = looked.at(ids_NT[-step:])
    limit, count, gains = len(ids_NT) - step, step, list[float]()
    seen = looked.at(ids_NT[:count])
    loss = looked.losses(seen, aside)
    while 2 * count <= limit:
        clock.say("text", f"trying whether {2 * count * ids_NT.shape[1]:,} tokens are better than half as many")
        seen = _joined(seen, looked.at(ids_NT[count : 2 * count]))
        after = looked.losses(seen, aside)
        gains.append(round(1 - math.exp(sum(math.log(b / a) for a, b in zip(loss, after, strict=True)) / len(loss)), 4))
        if gains[-1] < GAIN:
            return {"windows": count, "gains": gains}
        count, loss = 2 * count, after
    return {"windows": len(ids_NT), "gains": gains}


@dataclass(frozen=True, eq=False)
class _Look:
    """The first block, as the plan's moves of the whole model leave it."""

    job: Job
    runner: Runner
    outer: Weights
    weights: Weights
    sites: Sequence[Site]

    def at(self, ids_NT: Tensor) -> dict[str, Stats]:
        """Site → XᵀX of what it reads of these windows."""
        work = Pass(self.job, Calibration(ids_NT, ""), self.runner)
        work.begin(self.outer)
        return work.see(0, self.weights, {site.name: HESSIAN for site in self.sites})[0]

    def losses(self, seen: Mapping[str, Stats], aside: Mapping[str, Stats]) -> list[float]:
        """Of each site; never 0."""
        jobs = []
        for site in self.sites:
            w_OI = self.weights[f"{site.name}.weight"]
            choice = self.job.choices[site.name]
            assert choice is not None, "chosen for it"
            few = refusal(parts.format_of(choice), (min(ROWS, site.shape[0]), site.shape[1])) is None
            rows_RI = w_OI[: ROWS if few else None].float()
            jobs.append(Tried(rows_RI, choice, seen[site.name], aside[site.name]).loss)
        found = [max(loss, 1e-30) for loss in side_by_side(jobs, self.job.at_once)]
        for stats in seen.values():
            forget(stats["hessian"])
        return found


def _joined(a: Mapping[str, Stats], b: Mapping[str, Stats]) -> dict[str, Stats]:
    """Statistics of two texts together, in the place of the first."""
    found: dict[str, Stats] = {}
    known: dict[int, Stats] = {}  # sites of one tap share their statistics
    for name, one in a.items():
        other = b[name]
        if id(one) not in known:
            n, m = int(one["count"]), int(other["count"])
            total = max(1, n + m)
            one["hessian"].mul_(n / total).add_(other["hessian"], alpha=m / total)
            known[id(one)] = {"hessian": one["hessian"], "count": one["count"] + other["count"]}
        found[name] = known[id(one)]
    return found
