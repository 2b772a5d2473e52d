"""Read YAML so that every value knows its line: a wrong key can then be named with its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from regauge.errors import RecipeError, nearest
from regauge.parts import Option

MOST, DEEP = 100_000, 50  # values of a recipe, and how deep they may nest
BYTES = 1_000_000  # characters of its text: YAML is read slowly
TEXT = "tag:yaml.org,2002:str"
LONG, BEYOND = 10_000, 1 << 63  # characters of a value; whole numbers are below


class PlacedError(RecipeError):
    """A recipe error whose message already says where."""


@dataclass(frozen=True)
class Node:
    """A value of a recipe with its place.

    Attributes:
        value: a scalar, a tuple of nodes, or a mapping of nodes.
        place: `recipe.yaml, line 3: rules › head`.
    """

    value: Option | tuple[Node, ...] | Mapping[str, Node] | None
    place: str

    def error(self, message: str) -> PlacedError:
        return PlacedError(f"{self.place}: {message}")

    def mapping(self, what: str) -> Mapping[str, Node]:
        if not isinstance(self.value, Mapping):
            raise self.error(f"{what} must be a mapping, not {self._shown()}")
        return self.value

    def items(self, what: str) -> tuple[Node, ...]:
        if not isinstance(self.value, tuple):
            raise self.error(f"{what} must be a list, not {self._shown()}")
        return self.value

    def text(self, what: str) -> str:
        if not isinstance(self.value, str):
            raise self.error(f"{what} must be text, not {self._shown()}")
        return self.value

    def count(self, what: str) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value <= 0:
            raise self.error(f"{what} must be a whole number above 0, not {self._shown()}")
        return self.value

    def scalar(self, what: str) -> Option:
        if self.value is None or isinstance(self.value, Mapping | tuple):
            raise self.error(f"{what} must be one value, not {self._shown()}")
        return self.value

    def _shown(self) -> str:
        if self.value is None:
            return "nothing"
        if isinstance(self.value, Mapping):
            return "a mapping"
        return "a list" if isinstance(self.value, tuple) else repr(self.value)


def keys(node: Node, known: tuple[str, ...], what: str, required: tuple[str, ...] = ()) -> Mapping[str, Node]:
    """The mapping, after every key is known and every required one is there."""
    found = node.mapping(what)
    for key, value in found.items():
        if key not in known:
            raise value.error(f"unknown key {key!r} in {what}{nearest(key, known)}")
    for key in required:
        if key not in found:
            raise node.error(f"{what} lacks {key!r}")
    return found


def read(text: str, where: str) -> Node:
    """The tree of a YAML document. `where` names it in messages."""
    if len(text) > BYTES:
        raise RecipeError(f"{where}: a recipe has at most {BYTES:,} characters, and this has {len(text):,}")
    if _depth(text) > 2 * DEEP:
        raise RecipeError(f"{where}: a recipe nests at most {DEEP} deep")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{where}{line}: this is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: this is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: this is not a recipe: it nests without end") from error
    if root is None:
        raise RecipeError(f"{where}: the recipe is empty")
    return _node(root, where, "", frozenset(), [MOST])


def _node(
    node: yaml.Node, where: str, path: str, above: frozenset[int], left: list[int], key: yaml.Node | None = None
) -> Node:
    """
    Args:
        above: the nodes that this one is in.
        left: how many more values a recipe may have; aliases count as often as they are used.
    """
    left[0] -= 1
    if left[0] < 0 or len(above) > DEEP:
        raise RecipeError(f"{where}: a recipe has at most {MOST:,} values, nested at most {DEEP} deep")
    place = f"{where}, line {(key or node).start_mark.line + 1}" + (f": {path}" if path else "")
    if id(node) in above:
        raise RecipeError(f"{place}: an alias that holds itself")
    above = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return Node(tuple(_node(item, where, path, above, left) for item in node.value), place)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Node] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            if not name:
                raise RecipeError(f"{place}: a key must be a word")
            inner = _node(value, where, f"{path} › {name}" if path else name, above, left, key)
            if name in found:
                raise inner.error(f"{name!r} is written twice")
            found[name] = inner
        return Node(found, place)
    return Node(_scalar(node, place), place)


def _depth(text: str) -> int:
    """How deep brackets stand in one another, those in texts too. The parser's time grows with its square."""
    deep = most = 0
    for mark in re.findall(r"[\[{}\]]", text):
        deep = deep + 1 if mark in "[{" else max(0, deep - 1)
        most = max(most, deep)
    return most


def _scalar(node: yaml.Node, place: str) -> Option | None:
    """A single value; what is neither text, number nor truth (a date) is its text.

    Raises:
        RecipeError: its tag makes no such value, or it is too long or too large.
    """
    written = str(node.value)
    if len(written) > LONG:
        raise RecipeError(f"{place}: a value has at most {LONG:,} characters, and this has {len(written):,}")
    if node.tag == TEXT:  # most are, and to make a loader takes a while
        return written
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise RecipeError(f"{place}: {written[:80]!r} is no value of the kind that it is written as") from error
    if type(value) is int and abs(value) >= BEYOND:
        raise RecipeError(f"{place}: {written[:40]!r} is beyond every number that is taken")
    return value if value is None or isinstance(value, str | int | float | bool) else written
