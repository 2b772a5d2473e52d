"""The rewrites of a plan, with those by which a family is sorted."""

from __future__ import annotations

from regauge import parts
from regauge.elastic.order import ORDERS, SORTED
from regauge.parts import Spec
from regauge.plan.model import Plan


def sorting(plan: Plan) -> tuple[Spec, ...]:
    """The rewrites of a plan, with those by which a family's streams are sorted: of the whole model first, of blocks
    behind those of the whole model."""
    family = plan.family
    name = "" if family is None else ORDERS[family.order]
    if family is None or not name:
        return plan.rewrites
    kinds = [kind for dimension, kind in SORTED.items() if family.choices(dimension)]
    outer = [Spec(name, (("streams", kind),)) for kind in kinds if kind == "residual"]
    inner = "+".join(kind for kind in kinds if kind != "residual")
    found = [*outer, *plan.rewrites]
    if inner:
        scopes = [parts.build("rewrite", spec).scope for spec in found]
        last = max((at + 1 for at, scope in enumerate(scopes) if scope != "block"), default=0)
        found.insert(last, Spec(name, (("streams", inner),)))
    return tuple(dict.fromkeys(found))
