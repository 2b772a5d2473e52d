"""What a training would take, before it begins: counted from sizes and from a product that is timed now."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from regauge.elastic.family import in_any_order
from regauge.elastic.legal import reasons
from regauge.engine.duration import speed
from regauge.engine.raising import space_of
from regauge.engine.recovery_text import HELD_OUT, LOOKS, SPARE
from regauge.engine.room import LIBRARIES
from regauge.engine.teaching import kept_bytes
from regauge.engine.training_classes import LOOKED_AT, classifies, places
from regauge.engine.training_recipe import Asked, read_recipe, refuse_device
from regauge.engine.training_refusals import fitting
from regauge.engine.training_text import opened
from regauge.engine.watchdog import quiet_torch
from regauge.errors import BudgetError, RecipeError
from regauge.hosts import host_of
from regauge.kernels.cpu.machine import anonymous_bytes
from regauge.learn.ranks import processes
from regauge.learn.space import Turn
from regauge.learn.training import EACH, ORIGINAL
from regauge.plan import Plan
from regauge.runtime.device import placed
from regauge.text.corpora import Where

OVERHEAD = 1.6  # of running a block, over its products
HELD = (
    8  # float32 numbers for each that is trained: itself, two moments, the best, gradient, steps in the making, teacher
)
SAMPLED = 64  # steps that are drawn to see how much a step is


class Planned(BaseModel):
    """What a training would do.

    Attributes:
        choices: dimension → how many there are of each, as text.
        passes: members that a step trains, on average. seconds, memory, disk: estimates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    model: str
    choices: str
    steps: int
    batch: int
    passes: float
    seconds: float
    memory: int
    disk: int


def planned(
    recipe: str | Path | Plan, model: str | Path, text: Where | None = None, asked: Asked | None = None
) -> Planned:
    """Every refusal that can be made before the work, and what the work would cost.

    Raises:
        RegaugeError: as `train`.
    """
    asked = asked or Asked()
    with quiet_torch():
        plan, training = read_recipe(recipe, asked.amounts)
        refuse_device(training, asked.device)
        source = host_of(model).open(model, asked.revision)
        anatomy, seen, family = fitting(plan, training, source, asked), classifies(source), plan.family
        opened(source, text, asked.amounts, asked.seed)
        assert family is not None, "a recipe that trains has one"
        family = in_any_order(family, anatomy.blocks)
        if why := reasons(family, anatomy):
            raise RecipeError(f"this model cannot be such a family: {'; '.join(why)}")
        bits = sorted(family.bits, reverse=True) if training.rank else ()
        space = space_of(family, anatomy, training.layers == EACH, bits)
        sizes = [
            [1.0 if bits else space.size(one.subnet) for one in training.draws(space, Turn(turn, SAMPLED, asked.seed))]
            for turn in range(SAMPLED)
        ]
        blocks = sum(math.prod(site.shape) * places(source, site) for site in anatomy.sites if site.block is not None)
        head = next((math.prod(site.shape) for site in anatomy.sites if site.name == "head"), 0)
        forward = 2 * speed(where=placed(asked.device).where) * OVERHEAD  # seconds of a weight, a token
        each = sum(3 * (size * blocks + head) for drawn in sizes for size in drawn) / SAMPLED
        each += (blocks + head) * (training.teacher == ORIGINAL)
        step = each * forward * training.batch
        look = forward * (blocks + head) * (LOOKED_AT if seen else HELD_OUT) * 2
        steps, limit = training.steps, asked.amounts.time
        if limit is not None and asked.amounts.steps is None:
            steps = int((limit * SPARE - (LOOKS + 3) * look) / step)
            if steps < 1:
                raise BudgetError(
                    f"the time of {limit:.0f} s does not suffice: a step is estimated at {step:.1f} s and a look at "
                    f"the text held out at {look:.1f} s; give it more time."
                )
        parameters = source.parameters()
        widths = sum(sum(site.shape) for site in anatomy.sites)
        held = HELD * parameters
        if asked.shard:  # its part of each; but first the whole is read, and a block and the rest are gathered in turn
            whole, unit = parameters, head + blocks // max(anatomy.blocks, 1)
            held = int(max(held / processes(), whole + 3 * whole / processes()) + 2 * unit)
        if training.teacher == ORIGINAL:
            tokens = asked.amounts.tokens or steps * training.batch
            held += kept_bytes(training.distiller, anatomy.blocks, anatomy.hidden, tokens) // 4
        flowing = training.batch * (widths + 8 * (head // max(anatomy.hidden, 1)))
        return Planned(
            recipe=plan.name,
            model=str(source.path),
            choices=", ".join(f"{name} ({len(some)})" for name, some in space.choices.items()),
            steps=steps,
            batch=training.batch,
            passes=sum(map(len, sizes)) / SAMPLED,
            seconds=steps * step + (LOOKS + 1) * look,
            memory=int(anonymous_bytes() + LIBRARIES + 4 * (held + 2 * flowing)),
            disk=2 * source.bytes_bf16() + 16 * parameters,
        )
