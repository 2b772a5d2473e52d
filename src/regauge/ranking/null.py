"""The null of a recipe: the same bits, grains and inputs, rounded to nearest, nothing rewritten and nothing added back.

What a method is worth is what it gains over this; of a recipe that prunes, over as many units drawn by lot.
"""

from __future__ import annotations

from dataclasses import replace

from regauge import parts
from regauge.parts import CACHE, INPUTS, SHAPE, WEIGHTS, Point, Spec
from regauge.plan import Plan, Rule, digest

PLAIN_STEPS = ("f32", "f16", "bf16", "f16-low", "super", "super-low")
"""Steps that a null keeps; of others it takes bf16."""
LEARNT = "learnt-static"


def null(plan: Plan) -> Plan | None:
    """The same bits and grains rounded to nearest; None where that is the plan itself. What it keeps of the past stays
    as the plan has it."""
    rules = {
        WEIGHTS: tuple(Rule(rule.select, rule.point and _nearest(rule.point)) for rule in plan.of(WEIGHTS)),
        INPUTS: tuple(Rule(rule.select, rule.point and _alike(rule.point)) for rule in plan.of(INPUTS)),
        SHAPE: tuple(Rule(rule.select, rule.point and _by_lot(rule.point)) for rule in plan.of(SHAPE)),
        CACHE: plan.of(CACHE),
    }
    made = Plan(name=f"null-of-{plan.name}", places=rules)
    return None if digest(made) == digest(replace(plan, calibration={})) else made


def _nearest(point: Point) -> Point:
    bits = parts.build("grid", point.spec("grid")).width
    grid, ranger = ("int8", "absmax") if bits == 8 else (f"int{bits}-asym", "minmax")
    scale = point["scale"] if point.name("scale") in PLAIN_STEPS else Spec("bf16")
    rest = {"ranger": Spec(ranger), "scale": scale, "rounder": Spec("nearest"), "compensator": None}
    return point.but(grid=Spec(grid), **rest)


def _alike(point: Point) -> Point:
    if point.name("ranger") == LEARNT:  # the range is what is learnt, so the grid is not what differs
        return point.but(ranger=Spec("static"), transform=Spec("identity"))
    return point.but(grid=Spec(f"int{parts.build('grid', point.spec('grid')).bits}"), transform=Spec("identity"))


def _by_lot(point: Point) -> Point:
    return point.but(score=Spec("random"), repair=Spec("none"))
