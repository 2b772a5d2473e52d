"""Several recipes as one, `gptq-w4g128 + kivi-4` or `snapkv + kivi-4`: each says what the others leave open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regauge.elastic.family import told
from regauge.errors import RecipeError
from regauge.parts import PLACES, Point, Spec
from regauge.plan.model import Plan, Rule

BETWEEN = "+"
"""Between names of recipes."""
WIDER = "window"
"""The axis on which two numbers go together: the larger keeps what both keep."""


def combined(plans: Sequence[Plan]) -> Plan:
    """One plan that does what all of them do.

    Rules of one selector become one rule, of all their coordinates; of two windows the wider is taken. Other rules
    stand behind each other, in the order of the plans, and the last that matches wins as in any recipe.

    Raises:
        RecipeError: two of them say different things of the same.
    """
    name = f" {BETWEEN} ".join(plan.name for plan in plans)
    learning: dict[str, int | str] = {}
    for plan in plans:
        for key, value in plan.learning.items():
            if learning.setdefault(key, value) != value:
                raise RecipeError(f"{name}: two of them train otherwise ({key} {learning[key]} and {value}); write one")
    families = list({str(told(plan.family)): plan.family for plan in plans if plan.family is not None}.values())
    if len(families) > 1:
        raise RecipeError(
            f"{name}: two of them are families of other members; write one recipe with the choices of both"
        )
    trained = [plan.train for plan in plans if plan.train]
    if any(train != trained[0] for train in trained):
        raise RecipeError(f"{name}: two of them train a family otherwise; write one recipe that says how")
    sizes = [plan.calibration for plan in plans if plan.calibration]
    return Plan(
        name=name,
        places={place: _rules(plans, place, name) for place in PLACES},
        rewrites=tuple(dict.fromkeys(spec for plan in plans for spec in plan.rewrites)),
        title="; ".join(plan.title for plan in plans if plan.title),
        cite=tuple(dict.fromkeys(cite for plan in plans for cite in plan.cite)),
        differs="; ".join(plan.differs for plan in plans if plan.differs),
        row="none, it is several",
        check=tuple(dict.fromkeys(check for plan in plans for check in plan.check)),
        calibration={key: max(size[key] for size in sizes) for key in sizes[0]} if sizes else {},
        learning=learning,
        products=max(plan.products for plan in plans),
        statistics=max(plan.statistics for plan in plans),
        family=families[0] if families else None,
        train=trained[0] if trained else {},
    )


def _rules(plans: Sequence[Plan], place: str, name: str) -> tuple[Rule, ...]:
    found: dict[str, Point | None] = {}
    for rule in (rule for plan in plans for rule in plan.of(place)):
        if rule.select not in found:
            found[rule.select] = rule.point
            continue
        before = found[rule.select]
        if before is None or rule.point is None:
            if before != rule.point:
                raise RecipeError(f"{name}: one leaves {place} of {rule.select!r} as they are, and another does not")
            continue
        found[rule.select] = Point.of(place, _both(dict(before), dict(rule.point), f"{name}: {place} {rule.select!r}"))
    return tuple(Rule(select, point) for select, point in found.items())


def _both(one: Mapping[str, Spec], other: Mapping[str, Spec], where: str) -> dict[str, Spec]:
    found = dict(one)
    for axis, spec in other.items():
        had = found.setdefault(axis, spec)
        if had == spec:
            continue
        if axis != WIDER or not (had.part.isdecimal() and spec.part.isdecimal()):
            raise RecipeError(f"{where} would have {axis} {had.part!r} and {spec.part!r}; they do not go together")
        found[axis] = max(had, spec, key=lambda spec: int(spec.part))
    return found
