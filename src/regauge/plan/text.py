"""Recipes as text: parse. (`spelling.py` prints, hashes and compares them.)

A recipe is one YAML mapping, read strictly:

    name: gptq-w4g128
    cite: [arXiv:2210.17323]
    calibration: {tokens: 262144, length: 2048}
    learning: {steps: 320, batch: 2048}
    statistics: anew
    rewrites: [fold-norm, {part: smooth-norms, alpha: 0.5}]
    weights:
      blocks.*: {grid: int4, grain: group:128 else channel, ranger: search, scale: f16, rounder: gptq}
      "*.down": full
    inputs:
      blocks.*.mlp.hidden: {grid: int8, grain: token}
    cache:
      "*": {keys: int2-asym/time:32, values: int2-asym/group:32}
    family: {depth: [8, 6], ffn: [1, 0.5]}
    train: {sampler: sandwich:2, distiller: kl}

One section a place. The older key `rules` reads as `weights`, and the older coordinate `activations: int8` of a rule as
a rule of `inputs` for the taps that its sites read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from regauge import parts
from regauge.elastic.family import Family, family_of
from regauge.errors import RecipeError
from regauge.learn.settings import KEYS as LEARNING
from regauge.learn.settings import Settings
from regauge.learn.training import KEYS as TRAINING
from regauge.learn.training import Training, value_of
from regauge.parts import AXES, FORMAT, FORMATS, INPUTS, PLACES, REWRITES, WEIGHTS, WORD, Axis, Option, Point, Spec
from regauge.plan.model import ANEW, PROMISES, Plan, Rule
from regauge.plan.nodes import Node, PlacedError, keys, read
from regauge.plan.select import READ_BY

OLDER = "rules"
"""What `weights` was called."""
ACTIVATIONS = "activations"
"""What a point on `inputs` was called: a coordinate of the weights with the name of a grid."""
REWRITE = "rewrite"
TOLD = ("name", "title", "cite", "differs", "row", "check")
HEAD = (*TOLD, "calibration", "learning", "products", "statistics", "rewrites", "family", "train")
KEYS = (*HEAD, *PLACES, OLDER)
FULL = "full"
ALIKE = re.compile(r"\*|blocks\.(\*|\d+|\?|\[[^\]]*\]|\{[\d,]*\})(\.\*)?")
"""Selectors that match the same blocks whether they are read as sites or as taps."""


def parse(recipe: str | Mapping[str, object], where: str = "recipe", trusted: bool = True) -> Plan:
    """A recipe's text, or the same as a mapping, to a plan. An error names its key, its line and the nearest name.

    Args:
        where: how messages call it.
        trusted: False for a file that others wrote, such as the recipe inside an artifact: it must not name code.
    """
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False)
    root = read(text, where)
    found = keys(root, KEYS, "a recipe")
    if OLDER in found and WEIGHTS in found:
        raise found[OLDER].error(f"{OLDER!r} is the older name of {WEIGHTS!r}: write one of them")
    reader = _Reader(trusted)
    sections = {WEIGHTS if key == OLDER else key: found[key].mapping(key) for key in (*PLACES, OLDER) if key in found}
    rules = {place: reader.rules(place, rows) for place, rows in sections.items()}
    rules[INPUTS] = (*reader.activations(sections.get(WEIGHTS, {})), *rules.get(INPUTS, ()))
    rewrites = tuple(
        reader.spec(REWRITE, REWRITES, node)
        for node in (found["rewrites"].items("rewrites") if "rewrites" in found else ())
    )
    family = _family(found["family"]) if "family" in found else None
    train = _train(found["train"]) if "train" in found else {}
    if train and family is None:
        raise found["train"].error("what is trained is a family: say 'family' too")
    if not any(rules.values()) and not rewrites and family is None:
        raise root.error(f"a recipe needs 'rewrites', a 'family' or rules for a place ({', '.join(PLACES)})")
    calibration = keys(found["calibration"], ("tokens", "length"), "calibration") if "calibration" in found else {}
    if "products" in found and found["products"].text("products") not in PROMISES:
        raise found["products"].error(f"products are {' or '.join(PROMISES)}, or nothing is said of them")
    if "statistics" in found and found["statistics"].text("statistics") not in ANEW:
        raise found["statistics"].error(f"statistics are taken {' or '.join(ANEW)}, or nothing is said of them")
    texts = {key: found[key].text(key) for key in ("title", "differs", "row", "products", "statistics") if key in found}
    return Plan(
        name=found["name"].text("name") if "name" in found else "recipe",
        places=rules,
        rewrites=rewrites,
        cite=_listed(found, "cite"),
        check=_listed(found, "check"),
        calibration={key: node.count(key) for key, node in calibration.items()},
        learning=_learning(found["learning"]) if "learning" in found else {},
        family=family,
        train=train,
        **texts,
    )


def _listed(found: Mapping[str, Node], key: str) -> tuple[str, ...]:
    """The texts of a list."""
    return tuple(node.text(key) for node in found[key].items(key)) if key in found else ()


def _family(node: Node) -> Family:
    """What `family:` says."""
    node.mapping("a family")
    try:
        return family_of(_plain(node))
    except ValueError as error:
        raise node.error(str(error)) from error


def _train(node: Node) -> dict[str, int | float | str]:
    """What `train:` says, each value of the kind that it must be."""
    found: dict[str, int | float | str] = {}
    for key, value in keys(node, tuple(TRAINING), "train").items():
        try:
            found[key] = value_of(key, value.scalar(key))
            Training(**{key: found[key]})  # type: ignore[arg-type]  # of its kind
        except ValueError as error:
            raise value.error(str(error)) from error
    if not found:
        raise node.error(f"train says nothing; write one of {', '.join(TRAINING)}")
    try:
        Training(**found)  # type: ignore[arg-type]  # each of its kind
    except ValueError as error:
        raise node.error(str(error)) from error
    return found


def _plain(node: Node) -> Any:
    """A value without its places."""
    if isinstance(node.value, Mapping):
        return {key: _plain(value) for key, value in node.value.items()}
    return [_plain(value) for value in node.value] if isinstance(node.value, tuple) else node.value


def _learning(node: Node) -> dict[str, int | str]:
    """What `learning:` says, each value of the kind that it must be."""
    found: dict[str, int | str] = {}
    for key, value in keys(node, tuple(LEARNING), "learning").items():
        if LEARNING[key] is str:
            found[key] = value.text(key)
        elif isinstance(value.value, int) and not isinstance(value.value, bool):
            found[key] = value.value
        else:
            raise value.error(f"{key} must be a whole number, not {value.value!r}")
        try:
            Settings(**{key: found[key]})  # type: ignore[arg-type]  # of the kind that LEARNING says
        except ValueError as error:
            raise value.error(str(error)) from error
    return found


@dataclass(frozen=True)
class _Reader:
    """From nodes to rules, points and specs.

    Attributes:
        trusted: whether parts of other packages may be named.
    """

    trusted: bool

    def rules(self, place: str, rows: Mapping[str, Node]) -> tuple[Rule, ...]:
        return tuple(Rule(select, self.point(place, node)) for select, node in rows.items())

    def point(self, place: str, node: Node) -> Point | None:
        if node.value == FULL:
            return None
        axes = {axis.name: axis for axis in PLACES[place].axes}
        if not isinstance(node.value, Mapping):
            like = ", ".join(f"{axis.name}: …" for axis in axes.values() if axis.required) or f"{next(iter(axes))}: …"
            like = "grid: int4, grain: channel" if place == WEIGHTS else like
            raise node.error(f"write 'full' or coordinates such as {{{like}}}, not {node.value!r}")
        older = (ACTIVATIONS,) if place == WEIGHTS else ()
        needed = tuple(axis.name for axis in axes.values() if axis.required)
        found = keys(node, (*AXES[place], *older), "a rule", needed)
        if not found:
            raise node.error(f"a rule of {place} says nothing; write one of {', '.join(AXES[place])}")
        specs = {axis.name: parts.read(axis.parts, axis.default, place) for axis in axes.values() if axis.default}
        specs |= {key: self.coordinate(place, axes[key], value) for key, value in found.items() if key in axes}
        return Point.of(place, specs)

    def activations(self, rows: Mapping[str, Node]) -> list[Rule]:
        """The rules of `inputs` that older rules of weights speak of, in their order."""
        made: list[Rule] = []
        for select, node in rows.items():
            row = node.value if isinstance(node.value, Mapping) else {}
            if ACTIVATIONS in row:
                grid = self.spec("grid", INPUTS, row[ACTIVATIONS])
                made.append(Rule(_readers(select), parts.point(INPUTS, grid=grid.part)))
            elif made:
                made.append(Rule(_readers(select), None))
        return made

    def coordinate(self, place: str, axis: Axis, node: Node) -> Spec:
        """The part that a rule names on an axis."""
        number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
        if axis.number and number:
            return Spec(str(_number(node)))
        if parts.empty(axis.parts, place):  # names that cannot be told right from wrong; the engine refuses them
            return self._unknown(axis.name, node)
        if axis.parts == FORMAT and isinstance(node.value, Mapping) and "part" not in node.value:
            return self._format(place, node)
        return self.spec(axis.parts, place, node)

    def spec(self, table: str, place: str, node: Node) -> Spec:
        try:
            spec = _named(table, place, node)
            self._trust(table, spec, node)
            if table == FORMAT:
                if all(not parts.foreign(half.part) for half in parts.halves(spec.part)):
                    parts.check(table, spec, place)
            elif not parts.foreign(spec.part) and (spec.options or parts.part(table, spec.part).short):
                parts.check(table, spec, place)
        except PlacedError:
            raise
        except RecipeError as error:
            raise node.error(str(error)) from error
        return spec

    def _format(self, place: str, node: Node) -> Spec:
        """`{grid: int2-asym, grain: time:32}`: a format that was not written in one word."""
        found = keys(node, tuple(axis.name for axis in FORMATS), "a format", WORD)
        word = "/".join(found[key].text(key) for key in WORD)
        rest = {key: value for key, value in found.items() if key not in WORD}
        return self.spec(FORMAT, place, Node({"part": Node(word, node.place), **rest}, node.place))

    def _unknown(self, axis: str, node: Node) -> Spec:
        if isinstance(node.value, Mapping):
            if "part" not in node.value:
                raise node.error(f"write the name of the {axis} or {{part: name, option: value}}")
            more = {key: _number(value) for key, value in node.value.items() if key != "part"}
            spec = Spec(node.value["part"].text("part"), tuple(sorted(more.items())))
        else:
            spec = Spec(node.text(axis))
        if not spec.part:
            raise node.error(f"a {axis} needs a name")
        self._trust(axis, spec, node)
        return spec

    def _trust(self, table: str, spec: Spec, node: Node) -> None:
        if self.trusted:
            return
        words = [*re.split(r"/| else ", spec.part), *(str(value) for _, value in spec.options)]
        for word in (piece for text in words for piece in re.split(r"/| else ", text)):
            if parts.foreign(word):
                raise node.error(
                    f"{table} {word!r} is code of another package, which a recipe that came with an artifact cannot "
                    "name; copy the recipe out and use that, where you trust it"
                )


def _readers(select: str) -> str:
    """The selector of the taps that some sites read."""
    pieces = [piece.strip() for piece in select.split("|")]
    if all(ALIKE.fullmatch(piece) for piece in pieces):
        return select
    return " | ".join(f"{READ_BY}{piece}" for piece in pieces)


def _named(table: str, place: str, node: Node) -> Spec:
    if not isinstance(node.value, Mapping):
        return parts.read(table, node.text(table), place)
    if "part" not in node.value:
        raise node.error(f"write the name of the {table} or {{part: name, option: value}}")
    named = parts.read(table, node.value["part"].text("part"), place)
    more = {key: _number(value) for key, value in node.value.items() if key != "part"}
    for key in sorted(more.keys() & dict(named.options).keys()):
        raise node.error(f"{key!r} is set twice")
    return Spec(named.part, tuple(sorted((dict(named.options) | more).items())))


def _number(node: Node) -> Option:
    value = node.scalar("an option")
    if isinstance(value, float) and not math.isfinite(value):
        raise node.error(f"an option must be finite, not {value}")
    return value
