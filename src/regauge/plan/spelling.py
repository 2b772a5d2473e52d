"""Plans as text: print, hash, compare. `parse(dump(plan)) == plan`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml

from regauge import parts
from regauge.elastic.family import told
from regauge.parts import FORMAT, WEIGHTS, Option, Point, Spec, axis_of
from regauge.plan.model import Plan, Rule
from regauge.plan.text import FULL, OLDER, REWRITE


@lru_cache(maxsize=4096, typed=True)
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


def _spelt(table: str, spec: Spec, known: bool = True) -> str:
    """One coordinate; `known`: its table has parts, so that a main option may be spelled behind a colon."""
    short = parts.spell(table, spec) if known else "" if spec.options else spec.part
    if short:
        return _scalar(short)
    return _row({"part": _scalar(spec.part)} | {key: _scalar(value) for key, value in spec.options})


def _coordinate(place: str, name: str, spec: Spec) -> str:
    axis = axis_of(place, name)
    if axis.number and not spec.options and _is_number(spec.part):
        return spec.part
    return _spelt(axis.parts, spec, axis.parts == FORMAT or not parts.empty(axis.parts, place))


def _is_number(text: str) -> bool:
    """Whether a bare number is read back as this very text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return type(value) in (int, float) and str(value) == text


def coordinates(point: Point) -> dict[str, str]:
    """Axis → spelling, in the order in which a row is printed."""
    return {name: _coordinate(point.place, name, spec) for name, spec in point}


def dump(plan: Plan) -> str:
    """The recipe as YAML, one row a rule. `parse(dump(plan)) == plan`, and what is printed prints back to itself."""
    lines = [f"name: {_scalar(plan.name, block=True)}"]
    if plan.title:
        lines.append(f"title: {_scalar(plan.title, block=True)}")
    if plan.cite:
        lines.append(f"cite: [{', '.join(_scalar(item) for item in plan.cite)}]")
    if plan.differs:
        lines.append(f"differs: {_scalar(plan.differs, block=True)}")
    if plan.row:
        lines.append(f"row: {_scalar(plan.row, block=True)}")
    if plan.check:
        lines.append(f"check: [{', '.join(_scalar(item) for item in plan.check)}]")
    if plan.calibration:
        lines.append(f"calibration: {_row({key: str(value) for key, value in plan.calibration.items()})}")
    if plan.learning:
        lines.append(f"learning: {_row({key: _scalar(value) for key, value in plan.learning.items()})}")
    if plan.products:
        lines.append(f"products: {_scalar(plan.products)}")
    if plan.statistics:
        lines.append(f"statistics: {_scalar(plan.statistics)}")
    if plan.rewrites:
        lines.append(f"rewrites: [{', '.join(_spelt(REWRITE, spec) for spec in plan.rewrites)}]")
    if plan.family is not None:
        lines.append(f"family: {_flow(told(plan.family))}")
    if plan.train:
        lines.append(f"train: {_row({key: _scalar(value) for key, value in plan.train.items()})}")
    for place, rules in plan.places.items():
        lines.append(f"{place}:")
        lines += [f"  {_scalar(rule.select, block=True)}: {_point(rule)}" for rule in rules]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """Plain data in one line."""
    if isinstance(value, Mapping):
        return _row({_scalar(str(key)): _flow(one) for key, one in value.items()})
    if isinstance(value, list):
        return f"[{', '.join(_flow(one) for one in value)}]"
    return _scalar(value)


def _point(rule: Rule) -> str:
    return FULL if rule.point is None else _row(coordinates(rule.point))


def digest(plan: Plan) -> str:
    """sha256 of what the plan does: its name, title and citations do not count."""
    meaning: dict[str, object] = {
        "rewrites": [_spelt(REWRITE, spec) for spec in plan.rewrites],
        OLDER: _meaning(plan, WEIGHTS),  # the key of version 1, so that a plan of weights alone keeps its hash
        "calibration": dict(sorted(plan.calibration.items())),
    }
    meaning |= {"learning": dict(sorted(plan.learning.items()))} if plan.learning else {}
    meaning |= {"products": plan.products} if plan.products else {}
    meaning |= {"statistics": plan.statistics} if plan.statistics else {}
    meaning |= {"family": told(plan.family)} if plan.family is not None else {}
    meaning |= {"train": dict(sorted(plan.train.items()))} if plan.train else {}
    meaning |= {place: _meaning(plan, place) for place in plan.places if place != WEIGHTS}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _meaning(plan: Plan, place: str) -> list[list[object]]:
    return [[rule.select, None if rule.point is None else coordinates(rule.point)] for rule in plan.of(place)]


def diff(a: Plan, b: Plan) -> tuple[str, ...]:
    """What differs, a line each: `weights › head: full → grid int8, …`. Empty where both do the same."""
    lines = []
    if a.rewrites != b.rewrites:
        lines.append(f"rewrites: {_list(a)} → {_list(b)}")
    if dict(a.calibration) != dict(b.calibration):
        lines.append(f"calibration: {dict(a.calibration)} → {dict(b.calibration)}")
    if dict(a.learning) != dict(b.learning):
        lines.append(f"learning: {dict(a.learning)} → {dict(b.learning)}")
    if a.products != b.products:
        lines.append(f"products: {a.products or 'any'} → {b.products or 'any'}")
    if a.statistics != b.statistics:
        lines.append(f"statistics: {a.statistics or 'as they were'} → {b.statistics or 'as they were'}")
    if a.family != b.family:
        said = [_flow(told(plan.family)) if plan.family is not None else "none" for plan in (a, b)]
        lines.append(f"family: {' → '.join(said)}")
    if dict(a.train) != dict(b.train):
        lines.append(f"train: {dict(a.train)} → {dict(b.train)}")
    for place in dict.fromkeys([*a.places, *b.places]):
        rows = [{rule.select: _told(rule.point) for rule in plan.of(place)} for plan in (a, b)]
        told = []
        for select in dict.fromkeys([*rows[0], *rows[1]]):
            before, after = (row.get(select, "absent") for row in rows)
            if before != after:
                told.append(f"{place} › {select}: {before} → {after}")
        if not told and a.of(place) != b.of(place):
            told.append(f"{place}: the same in another order")
        lines += told
    return tuple(lines)


def _list(plan: Plan) -> str:
    return ", ".join(_spelt(REWRITE, spec) for spec in plan.rewrites) or "none"


def _told(point: Point | None) -> str:
    return FULL if point is None else ", ".join(f"{key} {value}" for key, value in coordinates(point).items())
