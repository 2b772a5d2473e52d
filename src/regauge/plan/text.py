"""Recipes as text: parse, print, hash, compare.

A recipe is one YAML mapping, read strictly:

    name: gptq-w4g128
    cite: [arXiv:2210.17323]
    calibration: {tokens: 262144, length: 2048}
    rewrites: [fold-norm, {part: smooth-norms, alpha: 0.5}]
    rules:
      blocks.*: {grid: int4, grain: group:128 else channel, ranger: search, scale: f16, rounder: gptq}
      "*.down": full
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import lru_cache

import yaml

from regauge import parts
from regauge.errors import RecipeError
from regauge.parts import Choice, Option, Spec
from regauge.plan.model import Plan, Rule
from regauge.plan.nodes import Node, PlacedError, keys, read

KEYS = ("name", "title", "cite", "differs", "calibration", "rewrites", "rules")
COORDINATES = ("grid", "grain", "ranger", "scale", "rounder", "compensator", "activations")
REQUIRED = ("grid", "grain")
DEFAULTS = {"ranger": "minmax", "scale": "bf16", "rounder": "nearest"}
FULL = "full"


def axis_of(coordinate: str) -> str:
    """The axis that a coordinate is on: activations are named by their grid."""
    return "grid" if coordinate == "activations" else coordinate


def parse(recipe: str | Mapping[str, object], where: str = "recipe") -> Plan:
    """A recipe's text, or the same as a mapping, to a plan. An error names its key, its line and the nearest name."""
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False)
    root = read(text, where)
    found = keys(root, KEYS, "a recipe")
    name = found["name"].text("name") if "name" in found else "recipe"
    rules = tuple(
        Rule(select, _choice(node))
        for select, node in (found["rules"].mapping("rules") if "rules" in found else {}).items()
    )
    rewrites = tuple(
        _spec("rewrite", node) for node in (found["rewrites"].items("rewrites") if "rewrites" in found else ())
    )
    if not rules and not rewrites:
        raise root.error("a recipe needs 'rules' or 'rewrites'")
    calibration = keys(found["calibration"], ("tokens", "length"), "calibration") if "calibration" in found else {}
    return Plan(
        name=name,
        rules=rules,
        rewrites=rewrites,
        title=found["title"].text("title") if "title" in found else "",
        cite=tuple(node.text("cite") for node in found["cite"].items("cite")) if "cite" in found else (),
        differs=found["differs"].text("differs") if "differs" in found else "",
        calibration={key: node.count(key) for key, node in calibration.items()},
    )


def _choice(node: Node) -> Choice | None:
    if node.value == FULL:
        return None
    if not isinstance(node.value, Mapping):
        raise node.error(f"write 'full' or coordinates such as {{grid: int4, grain: channel}}, not {node.value!r}")
    found = keys(node, COORDINATES, "a rule", REQUIRED)
    specs = {key: parts.read(axis_of(key), text) for key, text in DEFAULTS.items()}
    return Choice(**specs | {key: _spec(axis_of(key), value) for key, value in found.items()})


def _spec(axis: str, node: Node) -> Spec:
    try:
        spec = _named(axis, node)
        if not parts.foreign(spec.part) and (spec.options or parts.part(axis, spec.part).short):
            parts.check(axis, spec)
    except PlacedError:
        raise
    except RecipeError as error:
        raise node.error(str(error)) from error
    return spec


def _named(axis: str, node: Node) -> Spec:
    if not isinstance(node.value, Mapping):
        return parts.read(axis, node.text(axis))
    if "part" not in node.value:
        raise node.error(f"write the name of the {axis} or {{part: name, option: value}}")
    named = parts.read(axis, node.value["part"].text("part"))
    more = {key: _number(value) for key, value in node.value.items() if key != "part"}
    for key in sorted(more.keys() & dict(named.options).keys()):
        raise node.error(f"{key!r} is set twice")
    return Spec(named.part, tuple(sorted((dict(named.options) | more).items())))


def _number(node: Node) -> Option:
    value = node.scalar("an option")
    if isinstance(value, float) and not math.isfinite(value):
        raise node.error(f"an option must be finite, not {value}")
    return value


@lru_cache(maxsize=4096)
def _scalar(value: Option, block: bool = False) -> str:
    """As YAML inside a flow row, or after a key of a block: plain where that reads back the same."""
    if isinstance(value, str):
        try:
            text = f"- {value}" if block else f"[{value}]"
            if value == value.strip() and "\n" not in value and yaml.safe_load(text) == [value]:
                return value
        except yaml.YAMLError:
            pass
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return "true" if value else "false"
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


def _row(items: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"


def _spelt(axis: str, spec: Spec) -> str:
    short = parts.spell(axis, spec)
    if short:
        return _scalar(short)
    return _row({"part": _scalar(spec.part)} | {key: _scalar(value) for key, value in spec.options})


def coordinates(choice: Choice) -> dict[str, str]:
    """Axis → spelling, in the order in which a row is printed."""
    specs = {key: getattr(choice, key) for key in COORDINATES}
    return {key: _spelt(axis_of(key), spec) for key, spec in specs.items() if spec is not None}


def dump(plan: Plan) -> str:
    """The recipe as YAML, one row a rule. `parse(dump(plan)) == plan`, and what is printed prints back to itself."""
    lines = [f"name: {_scalar(plan.name, block=True)}"]
    if plan.title:
        lines.append(f"title: {_scalar(plan.title, block=True)}")
    if plan.cite:
        lines.append(f"cite: [{', '.join(_scalar(item) for item in plan.cite)}]")
    if plan.differs:
        lines.append(f"differs: {_scalar(plan.differs, block=True)}")
    if plan.calibration:
        lines.append(f"calibration: {_row({key: str(value) for key, value in plan.calibration.items()})}")
    if plan.rewrites:
        lines.append(f"rewrites: [{', '.join(_spelt('rewrite', spec) for spec in plan.rewrites)}]")
    if plan.rules:
        lines.append("rules:")
    for rule in plan.rules:
        lines.append(
            f"  {_scalar(rule.select, block=True)}: {FULL if rule.choice is None else _row(coordinates(rule.choice))}"
        )
    return "\n".join(lines) + "\n"


def digest(plan: Plan) -> str:
    """sha256 of what the plan does: its name, title and citations do not count."""
    meaning = {
        "rewrites": [_spelt("rewrite", spec) for spec in plan.rewrites],
        "rules": [[rule.select, None if rule.choice is None else coordinates(rule.choice)] for rule in plan.rules],
        "calibration": dict(sorted(plan.calibration.items())),
    }
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def diff(a: Plan, b: Plan) -> tuple[str, ...]:
    """What differs, a line each: `rules › head: full → grid int8, …`. Empty where both do the same."""
    lines = []
    if a.rewrites != b.rewrites:
        lines.append(f"rewrites: {_list(a)} → {_list(b)}")
    if dict(a.calibration) != dict(b.calibration):
        lines.append(f"calibration: {dict(a.calibration)} → {dict(b.calibration)}")
    rows = [{rule.select: _told(rule.choice) for rule in plan.rules} for plan in (a, b)]
    for select in dict.fromkeys([*rows[0], *rows[1]]):
        before, after = (row.get(select, "absent") for row in rows)
        if before != after:
            lines.append(f"rules › {select}: {before} → {after}")
    if not lines and a.rules != b.rules:
        lines.append("rules: the same in another order")
    return tuple(lines)


def _list(plan: Plan) -> str:
    return ", ".join(_spelt("rewrite", spec) for spec in plan.rewrites) or "none"


def _told(choice: Choice | None) -> str:
    return FULL if choice is None else ", ".join(f"{key} {value}" for key, value in coordinates(choice).items())
