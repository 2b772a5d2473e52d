"""Embedding and head by an option of the user's, on top of any recipe: `--embed int8 --head int6-g64`."""

from __future__ import annotations

import dataclasses
import re

from regauge import parts
from regauge.errors import RecipeError
from regauge.parts import WEIGHTS, Point
from regauge.plan.model import Plan, Rule
from regauge.plan.presets import finer

WRITTEN = re.compile(r"(?P<grid>[a-z][a-z0-9]*(-asym)?)(-(?P<grain>channel|g(?P<group>[1-9][0-9]{0,4})))?")
FULL = "full"


def with_outer(plan: Plan, embed: str | None = None, head: str | None = None) -> Plan:
    """The plan with rules for embedding and head after its own.

    Args:
        embed, head: a grid and a grain, `int8`, `int6-g64`, `nf4-channel`; or `full`. None: as the plan has it.

    Raises:
        RecipeError: it says nothing that a table can be rounded to.
    """
    given = {name: text for name, text in (("embed", embed), ("head", head)) if text is not None}
    if not given:
        return plan
    rules = (*plan.rules, *(Rule(name, _point(name, text)) for name, text in given.items()))
    told = ", ".join(f"{name} {text}" for name, text in given.items())
    return dataclasses.replace(plan, name=f"{plan.name}, {told}", places={**plan.places, WEIGHTS: rules})


def _point(name: str, text: str) -> Point | None:
    if text == FULL:
        return None
    found = WRITTEN.fullmatch(text)
    if found is None:
        raise RecipeError(f"--{name} {text!r} names no format; write int8, int6-g64, nf4-channel or full.")
    grid, group = found["grid"], found["group"]
    grain = f"group:{group} else {finer(int(group))}" if group else "channel"
    if found["grain"] is None and not grid.startswith("int8"):
        grain = "group:128 else " + finer(128)
    try:
        said = {"grid": grid, "grain": grain, "ranger": "search", "scale": "bf16", "rounder": "nearest"}
        return Point.of(WEIGHTS, {axis: parts.read(axis, part, WEIGHTS) for axis, part in said.items()})
    except RecipeError as error:
        raise RecipeError(f"--{name} {text!r}: {error}") from error
