"""How blocks attend, settled before the streaming pass: the maps of the original model are looked at on a little text.

Maps are kept of the last few blocks, in 16 bits: at 32 heads some 34 MB a block. Matrices are calibrated after that as
if every block attended by itself, to everything.
Cost: one pass of the original over `TOKENS` tokens, and none where nothing is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regauge.artifact.staging import Staging
from regauge.attention.base import DISTANCE, LIKENESS, Seen
from regauge.attention.maps import distances, overlap
from regauge.attention.shares import REACH
from regauge.engine.job import Job
from regauge.engine.watchdog import Clock
from regauge.engine.wiring import wired
from regauge.errors import RecipeError
from regauge.hosts.base import MAPS
from regauge.parts import ATTENTION, Point
from regauge.plan import forms
from regauge.text.calibration import Calibration

TOKENS, LENGTH = 2048, 256
"""How many tokens of the text are looked at, and in windows of which length at most."""
SETTLED = "attention"


def formed(job: Job, windows: Calibration | None, staging: Staging, clock: Clock) -> tuple[Job, list[str]]:
    """The job with every block's attention settled, and what a reader must know of it.

    Raises:
        RecipeError: what the recipe asks for cannot be had of this model.
    """
    asked = job.resolution.at(ATTENTION)
    if not asked:
        return job, []
    seen = Seen(kv_heads=forms.kv_heads(job.anatomy))
    if needs := forms.needs_of(asked):
        assert windows is not None, "a recipe that measures reads text"
        seen = _seen(job, windows, needs, staging, clock)
    made = forms.settle(asked, job.anatomy, seen)
    return _with(job, made.points()), _notes(job, made, seen)


def _with(job: Job, points: Mapping[str, Point]) -> Job:
    """The job with settled points; nothing is done to queries and keys that go."""
    held = {**job.resolution.points, ATTENTION: points}
    gone = replace(job.wire.layout, attention=points).gone
    choices = {name: None if name in gone else point for name, point in job.choices.items()}
    resolution = replace(job.resolution, points=held, choices=choices)
    resolution, chosen = wired(job.plan, resolution, job.source, job.anatomy, job.shaping, job.wire.name)
    needs = {name: found for name, found in job.needs.items() if name not in gone}
    learnt = {name: found for name, found in job.learnt.items() if name not in gone}
    return replace(job, resolution=resolution, wire=chosen.wire, needs=needs, learnt=learnt)


def _seen(job: Job, windows: Calibration, needs: frozenset[str], staging: Staging, clock: Clock) -> Seen:
    """What the text shows; a run that goes on finds what an earlier one saw."""
    noted: Any = staging.notes.get(SETTLED)
    if not isinstance(noted, dict):
        noted = _looked(job, windows, needs, clock)
        staging.note(SETTLED, noted)
    far = {int(block): torch.tensor(held, dtype=torch.float64, device="cpu") for block, held in noted["far"].items()}
    alike = {(int(block), int(before)): float(value) for block, before, value in noted["alike"]}
    return Seen(alike, far, forms.kv_heads(job.anatomy), int(noted["tokens"]))


def _looked(job: Job, windows: Calibration, needs: frozenset[str], clock: Clock) -> dict[str, Any]:
    length = min(LENGTH, windows.inputs.shape[1])
    few = windows.inputs[: max(1, TOKENS // length), :length]
    maps: list[Tensor] = []
    kept: dict[int, list[Tensor]] = {}
    far: dict[str, list[float]] = {}
    alike: list[list[float]] = []
    kv_heads, sinks = forms.kv_heads(job.anatomy), _sinks(job.resolution.at(ATTENTION))
    clock.start("attention maps", job.anatomy.blocks)
    with job.host.maps(lambda p_BHQT, *_: maps.append(p_BHQT.to(torch.float16))):
        runner = job.host.runner(job.source, attention=MAPS)
        states = runner.begin(list(torch.split(few, 1)), job.source.block(None))
        for block in range(job.anatomy.blocks):
            states = runner.block(block, job.source.block(block), states)
            if block in kv_heads and len(maps) != len(states):
                raise RecipeError(f"a {job.anatomy.family} attends in a way of its own, and its maps cannot be seen")
            if LIKENESS in needs:
                alike += [[block, before, _mean(maps, held)] for before, held in kept.items() if _same(maps, held)]
                kept = {before: held for before, held in kept.items() if before > block - REACH} | {block: list(maps)}
            if DISTANCE in needs and block in kv_heads:
                each = [distances(p_BHQT, kv_heads[block], sinks) for p_BHQT in maps]
                far[str(block)] = (torch.stack(each).mean(0)).tolist()
            maps.clear()
            clock.tick("attention maps", block + 1, job.anatomy.blocks)
    return {"alike": alike, "far": far, "tokens": few.numel()}


def _mean(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return sum(overlap(p, q) for p, q in zip(some, others, strict=True)) / len(some)


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two blocks have maps of as many heads."""
    return bool(some) and [p.shape for p in some] == [q.shape for q in others]


def _sinks(points: Mapping[str, Point]) -> int:
    """The first tokens that no distance is counted to."""
    named = [point.spec(forms.WINDOW) for point in points.values() if point[forms.WINDOW] is not None]
    built = [forms.part_of(Point.of(ATTENTION, {forms.WINDOW: spec}), forms.WINDOW) for spec in dict.fromkeys(named)]
    return max((int(getattr(part, "sinks", 0)) for part in built), default=0)


def _notes(job: Job, made: forms.Forms, seen: Seen) -> list[str]:
    """Which blocks share, and what sees a window, a sentence each."""
    notes = []
    if made.shared:
        told = ", ".join(f"{block} of {leader}" for block, leader in made.shared.items())
        values = [seen.alike[pair] for pair in made.shared.items() if pair in seen.alike]
        how = f", {sum(values) / len(values):.2f} of them overlapping on {seen.tokens:,} tokens" if values else ""
        notes.append(f"blocks take the attention map of another and have no queries and keys: {told}{how}")
    if made.windows:
        heads = sum(len(local.numbers(seen.kv_heads[block])) for block, local in made.windows.items())
        local = next(iter(made.windows.values()))
        notes.append(
            f"{heads} of {sum(seen.kv_heads.values())} heads see the last {local.tokens} tokens and the first "
            f"{local.sinks} only; their cache keeps everything all the same, for only what they see is masked"
        )
    return notes
