"""What a recovery would take, before it begins: counted from sizes and from a product that is timed now."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from regauge.engine.duration import speed
from regauge.engine.pupil import Pupil
from regauge.engine.recovered import Opened, opened
from regauge.engine.recovery import Asked
from regauge.engine.recovery_text import BATCH, HELD_OUT, LOOKS, MOST, STEPS, Pace, material
from regauge.engine.room import LIBRARIES
from regauge.engine.watchdog import quiet_torch
from regauge.errors import BudgetError
from regauge.hosts.states import SPILL
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.text.corpora import Where

OVERHEAD = 1.5  # of running a block, over its products
HELD = (
    7  # float32 numbers for each that is trained: itself, two moments, the best, its gradient, the step in the making
)


class Planned(BaseModel):
    """What a recovery would do.

    Attributes:
        seconds, memory: estimates; memory is anonymous bytes at the highest. disk: bytes while it works.
        notes: what stays as it is and might not have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str
    original: str
    parameters: int
    steps: int
    batch: int
    tokens: int
    held_out: int
    seconds: float
    memory: int
    disk: int
    notes: tuple[str, ...] = ()


def planned(
    artifact: str | Path, text: Where | None = None, original: str | Path | None = None, asked: Asked | None = None
) -> Planned:
    """Every refusal that can be made before the work, and what the work would cost.

    Raises:
        RegaugeError: as `recover`.
    """
    asked, folder = asked or Asked(), Path(artifact).expanduser().absolute()
    with quiet_torch():
        found = opened(folder, original, asked.rank)
        material(found.source, text, asked.amounts, asked.seed)
        pupil = Pupil(found.artifact, asked.rank)
        parameters = sum(value.numel() for value in pupil.init().values())
        pace, amounts = _pace(found, pupil.small), asked.amounts
        most = amounts.tokens or 1 << 30
        steps = amounts.steps or (STEPS if amounts.time is None else pace.steps(amounts.time, BATCH, most))
        if steps < 1 or (amounts.time is not None and amounts.time < pace.step + 3 * pace.look):
            raise BudgetError(
                f"the time of {amounts.time or 0:.0f} s does not suffice: a step is estimated at {pace.step:.0f} s and "
                f"a look at the text held out at {pace.look:.0f} s; give it more time."
            )
        tokens = min(most, steps * BATCH)
        states = (tokens + HELD_OUT) * found.source.anatomy.hidden * 4
        return Planned(
            artifact=str(folder),
            original=str(found.source.path),
            parameters=parameters,
            steps=min(steps, MOST),
            batch=BATCH,
            tokens=tokens,
            held_out=HELD_OUT,
            seconds=steps * pace.step + (LOOKS + 1) * pace.look + (tokens + HELD_OUT) * pace.heard,
            memory=_memory(found, parameters, states, pupil.small),
            disk=found.receipt.bytes_after + 16 * parameters + (states if states > SPILL else 0),
            notes=tuple(pupil.notes()),
        )


def _pace(found: Opened, small: bool) -> Pace:
    """Seconds, from the speed of a product: forward once, backward twice, and forward again where it is not kept."""
    anatomy = found.artifact.layout.anatomy
    flop = speed()
    blocks = sum(math.prod(site.shape) for site in anatomy.sites if site.block is not None)
    head = math.prod(anatomy.site("head").shape)
    forward = 2 * (blocks + head) * flop * OVERHEAD
    step = (3 if small else 4) * forward + 2 * head * flop
    return Pace(2 * blocks * flop * OVERHEAD, step * BATCH, (forward + 2 * head * flop) * HELD_OUT)


def _memory(found: Opened, parameters: int, states: int, small: bool) -> int:
    """Anonymous bytes at the highest."""
    anatomy = found.artifact.layout.anatomy
    sizes = [sum(math.prod(site.shape) for site in anatomy.in_block(block)) for block in (None, *range(anatomy.blocks))]
    widths = [sum(sum(site.shape) for site in anatomy.in_block(block)) for block in range(anatomy.blocks)]
    at_once = sum(widths) if small else max(widths, default=0)
    weights = sum(sizes) if small else sizes[0] + max(sizes[1:], default=0)
    flowing = BATCH * (at_once + anatomy.blocks * anatomy.hidden)
    logits = 6 * BATCH * anatomy.site("head").shape[0]
    kept = min(states, SPILL)
    return int(anonymous_bytes() + LIBRARIES + kept + 4 * (HELD * parameters + 3 * weights + 2 * flowing + logits))
