"""What a preset or a part does, what it costs, whose it is, and where we differ: read off the parts themselves."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from regauge import parts
from regauge.errors import RecipeError, nearest
from regauge.parts import AXES, CACHE, FORMAT, INPUTS, TABLE, WEIGHTS, WORD, Point, Spec, axis_of, numeric
from regauge.plan import Plan, Rule, dump, load, patterns, presets
from regauge.plan.combining import BETWEEN
from regauge.plan.elsewhere import known_elsewhere
from regauge.report import speeds, trained
from regauge.report.columns import Facts, columns
from regauge.report.explanation_text import SHAPE, part_text, plan_text, standing_text
from regauge.report.standing import HAD

WHOLE = "weights and activations stay as they are"
KEPT = (
    "embeddings, head, routers, norms and biases stay in full precision, as the publications have it; "
    "a recipe takes them in by naming them (embed, head)"
)


def listing() -> dict[str, list[dict[str, str]]]:
    """Every preset file and every part in a line: kind or axis → rows of name and what."""
    found = {
        "preset": [
            {"name": spread(pattern.name, pattern.where), "what": spread(pattern.title, pattern.where)}
            for pattern in patterns()
        ]
    }
    for axis, table in TABLE.items():
        found[axis] = [{"name": name, "what": part.what} for name, part in table.items()]
    return found


def spread(text: str, where: Mapping[str, tuple[int, ...]]) -> str:
    """`gptq-w$bits` → `gptq-w{2-8}`."""
    for key, values in where.items():
        run = values == tuple(range(values[0], values[-1] + 1)) and len(values) > 2
        told = f"{values[0]}-{values[-1]}" if run else ",".join(map(str, values))
        text = re.sub(rf"\$\{{{key}\}}|\${key}\b", f"{{{told}}}", text)
    return text


def facts(name: str) -> list[Facts]:
    """Everything that is known under a name: a preset or recipe file first, then parts of each axis that has it."""
    found: list[Facts] = []
    if name in presets() or Path(name).suffix in (".yaml", ".yml") or BETWEEN in name:
        found.append(_of_plan(load(name)))
    found += [_of_part(axis, name) for axis, table in TABLE.items() if name in table]
    if name in HAD:
        told = asdict(HAD[name])
        found.append({"kind": "row", "name": name, **told, "cite": list(told["cite"]), "check": list(told["check"])})
    if not found:
        known = [*presets(), *HAD, *(part for table in TABLE.values() for part in table)]
        hint = nearest(name, known)
        more = hint if "did you mean" in hint else ""
        elsewhere = known_elsewhere(name)
        if elsewhere:
            raise RecipeError(elsewhere)
        raise RecipeError(f"nothing is called {name!r}{more}; 'regauge explain' without a name lists presets and parts")
    return found


def _of_plan(plan: Plan) -> Facts:
    from regauge.plan.keeping import told  # late, as the next two: explain's list is there without torch
    from regauge.plan.sorting import sorting
    from regauge.runtime.capabilities import keeps

    ours = [spec for spec in sorting(plan) if not parts.foreign(spec.part)]
    needs = sorted({need for spec in ours for need in parts.build("rewrite", spec).needs})
    rules: list[Facts] = []
    for place, rule in ((place, rule) for place, some in plan.places.items() for rule in some):
        row: Facts = {"place": place, "select": rule.select, "keeps": rule.point is None}
        if rule.point is not None:
            row["parts"] = [_line(axis_of(place, axis).parts, axis, spec) for axis, spec in rule.point]
            row["others"] = others = [spec.part for _, spec in rule.point if parts.foreign(spec.part)]
            if others:  # to say more, they would have to be called
                rules.append(row)
                continue
        if rule.point is not None and place == WEIGHTS:
            row["bits"] = bits(rule.point)
            row["stored"] = stored(rule.point, reading=_reading(plan, rule))
            row["runs"] = _runs(rule.point, _reading(plan, rule))
            needs = sorted({*needs, *_needs(rule.point)})
        if rule.point is not None and place == INPUTS:
            needs = sorted({*needs, *parts.maker_of(rule.point).needs, *parts.format_of(rule.point).ranger.needs})
        if rule.point is not None and place == CACHE:
            row |= {"takes": told(rule.point), "runs": keeps(rule.point)}
        if rule.point is not None and place == parts.SHAPE:  # what keeps no function is measured
            needs = sorted({*needs, *_shape_needs(rule.point), "the outputs of cut blocks"})
        rules.append(row)
    return {
        "kind": "preset",
        "name": plan.name,
        "title": plan.title,
        "cite": list(plan.cite),
        "differs": plan.differs,
        "row": plan.row,
        "check": list(plan.check),
        "needs": [need for need in needs if need != "joined"],
        "searches": [
            f"{spec.part} tries {len(values)} values of {option}, each a pass of the whole model"
            for spec in ours
            for option, values in parts.build("rewrite", spec).search.items()
        ],
        "calibration": dict(plan.calibration),
        "rewrites": [_line("rewrite", "rewrite", spec) for spec in sorting(plan)],
        "rules": rules,
        "speed": speeds.told(plan.name),
        "trained": trained.told(plan.name),
        "kept": WHOLE if set(plan.places) <= {CACHE} and not plan.rewrites else KEPT,
        "recipe": dump(plan),
    }


def _reading(plan: Plan, rule: Rule) -> Point | None:
    """How the sites of a rule of weights read their taps, where the recipe says both with one selector."""
    return next((other.point for other in reversed(plan.of(INPUTS)) if other.select == rule.select), None)


def _needs(choice: Point) -> set[str]:
    compensator = parts.compensator_of(choice)
    needs = set(parts.rounder_of(choice).needs - {"objective"})  # its own text: learning reads what it trains on
    return needs | (set(compensator.needs) if compensator is not None else set())


def _shape_needs(point: Point) -> set[str]:
    axes = [axis for axis in ("score", "repair") if point[axis] is not None]
    return {need for axis in axes for need in parts.build(axis, point.spec(axis)).needs}


def _line(axis: str, role: str, spec: Spec) -> dict[str, str]:
    if axis == FORMAT:
        halves = zip(WORD, parts.halves(spec.part), strict=True)
        what = ", ".join(parts.describe(table, half.part) for table, half in halves)
        return {"axis": role, "name": spec.part, "what": what, "cite": ""}
    if axis in AXES[CACHE] and numeric(axis_of(CACHE, axis), spec):
        return {"axis": role, "name": spec.part, "what": axis_of(CACHE, axis).what, "cite": ""}
    if axis not in TABLE:
        return {"axis": role, "name": spec.part, "what": "no part acts on this axis yet", "cite": ""}
    part = parts.part(axis, spec.part)
    if parts.foreign(spec.part):
        return {
            "axis": role,
            "name": spec.part,
            "what": "of another package; it is not called here",
            "cite": "",
        }
    spelt = parts.spell(axis, spec) or f"{spec.part} {', '.join(f'{key} {value}' for key, value in spec.options)}"
    return {"axis": role, "name": spelt, "what": part.what, "cite": part.cite}


def bits(choice: Point, shape: tuple[int, int] = SHAPE) -> float:
    """Stored bits a weight on a matrix of this shape, steps and zero points included, added low rank too."""
    return parts.bytes_of(choice, shape) * 8 / (shape[0] * shape[1])


def stored(choice: Point, shape: tuple[int, int] = SHAPE, reading: Point | None = None) -> str:
    """The format on disk of a matrix that every grain divides. What the rest of a model asks for may change it."""
    from regauge.artifact.codec.schemes import scheme_of

    scheme = scheme_of(choice, shape, reading)
    return f"regauge's packed format: {scheme}" if isinstance(scheme, str) else f"compressed-tensors, {scheme.format}"


def _runs(choice: Point, reading: Point | None) -> Mapping[str, str]:
    """Device → `native` or `simulated`, on a matrix of the usual shape."""
    from regauge.runtime.capabilities import runs

    return runs(choice, reading, SHAPE)


def _of_part(axis: str, name: str) -> Facts:
    part = parts.part(axis, name)
    made = parts.load(axis, name)
    return {
        "kind": axis,
        "name": name,
        "what": part.what,
        "cite": [part.cite] if part.cite else [],
        "options": {
            key: None if option.default is inspect.Parameter.empty else option.default
            for key, option in parts.options(axis, name).items()
        },
        "short": part.short,
        "places": list(part.places),
        "cost": part.cost,
        "used": [spread(p.name, p.where) for p in patterns() if any(uses(load(n), axis, name) for n in p.points())],
        "text": inspect.cleandoc(made.__doc__ or ""),
    }


def uses(plan: Plan, axis: str, name: str) -> bool:
    if axis == "rewrite":
        return any(spec.part == name for spec in plan.rewrites)
    points = [rule.point for rules in plan.places.values() for rule in rules if rule.point is not None]
    return any(axis_of(point.place, key).parts == axis and spec.part == name for point in points for key, spec in point)


def explain(name: str | None = None) -> str:
    """`explain("gptq-w4g128")`: what, paper, cost, parts, where we differ. Without a name: all presets and parts."""
    if name is None:
        return _listing_text()
    told = {"preset": plan_text, "row": standing_text}
    return "\n\n".join(told.get(str(found["kind"]), part_text)(found) for found in facts(name))


def _listing_text() -> str:
    lines: list[str] = []
    for axis, rows in listing().items():
        lines += [f"{axis}s" if axis == "preset" else axis, *columns([[row["name"], row["what"]] for row in rows]), ""]
    return "\n".join([*lines, "'regauge explain NAME' tells more of each."])
