"""Parts that cannot be built, or cannot do their work beside each other: every reason, whatever the model."""

from __future__ import annotations

from regauge import parts
from regauge.errors import RecipeError
from regauge.parts import FORMAT, WEIGHTS, Point, Spec, axis_of
from regauge.plan.model import Plan
from regauge.plan.text import REWRITE


def reasons_of_parts(plan: Plan) -> list[str]:
    """Parts that contradict each other or cannot be built, each once. Axes that have no parts yet are left out."""
    points = [rule.point for rules in plan.places.values() for rule in rules if rule.point is not None]
    reasons = dict.fromkeys(reason for point in points for reason in _contradictions(point))
    wanted: dict[tuple[str, Spec], None] = {(REWRITE, spec): None for spec in plan.rewrites}
    wanted |= {(axis_of(point.place, name).parts, spec): None for point in points for name, spec in known(point)}
    for table, spec in wanted:
        try:
            parts.build(table, spec)
        except RecipeError as error:
            reasons[str(error)] = None
    return list(reasons)


def known(point: Point) -> list[tuple[str, Spec]]:
    """The coordinates of a point that name parts: those on axes that have some, bare numbers left out."""
    axes = [(axis_of(point.place, name), spec) for name, spec in point]
    return [
        (axis.name, spec)
        for axis, spec in axes
        if not parts.empty(axis.parts, point.place) and not parts.numeric(axis, spec)
    ]


def _contradictions(point: Point) -> list[str]:
    reasons = []
    for axis, spec in known(point):
        table = axis_of(point.place, axis).parts
        if table == FORMAT:
            continue
        own = parts.part(table, spec.part)
        where = "" if point.place == WEIGHTS else f" of {point.place}"
        for other, allowed in own.wants.items():
            seen = point.name(other)
            if seen not in allowed and not parts.foreign(seen):
                ways = " or ".join(allowed)
                reasons.append(f"{axis} {spec.part!r}{where} works through {other} {ways}, and {seen!r} is set")
        for other, refused in own.refuses.items():
            seen = point.name(other)
            if seen in refused:
                reasons.append(f"{axis} {spec.part!r}{where} cannot stand beside {other} {seen!r}: {refused[seen]}")
    return reasons
