"""Presets: flat files, one row a published method. A file may stand for a few names that differ in numbers alone:
`name: gptq-w$bits` with `where: {bits: [2, 3, 4]}` is three presets, and `$bits` in its values is the number. Beside a
`$group`, `$finer` is what a matrix gets that it does not divide: the next smaller groups, then a channel.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import yaml

from regauge.documents import ordinary, read_text
from regauge.errors import RecipeError, nearest
from regauge.plan.combining import BETWEEN, combined
from regauge.plan.elsewhere import known_elsewhere
from regauge.plan.model import Plan
from regauge.plan.text import parse

LEAST = 32  # the smallest group that a preset falls back to: below it steps cost more than they save


@dataclass(frozen=True)
class Pattern:
    """A preset file.

    Attributes:
        name: with `$bits` where a number goes.
        title: as written, with `$bits`.
        where: placeholder → its numbers.
        text: the file without its `where` line.
        file: its name.
    """

    name: str
    title: str
    where: Mapping[str, tuple[int, ...]]
    text: str
    file: str

    def points(self) -> dict[str, dict[str, int]]:
        """Every name that the file stands for → its numbers."""
        values = [dict(zip(self.where, point, strict=True)) for point in itertools.product(*self.where.values())]
        return {string.Template(self.name).substitute({k: str(v) for k, v in point.items()}): point for point in values}


@cache
def patterns() -> tuple[Pattern, ...]:
    """Every preset file, by name."""
    found = []
    for file in sorted((files("regauge") / "presets").iterdir(), key=lambda item: item.name):
        if not file.name.endswith(".yaml"):
            continue
        text = file.read_text(encoding="utf-8")
        head = yaml.safe_load(text)
        where = {key: tuple(values) for key, values in head.get("where", {}).items()}
        body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("where:"))
        found.append(Pattern(head["name"], head.get("title", ""), where, body, file.name))
    return tuple(found)


@cache
def _names() -> Mapping[str, tuple[Pattern, Mapping[str, int]]]:
    found: dict[str, tuple[Pattern, Mapping[str, int]]] = {}
    for pattern in patterns():
        for name, point in pattern.points().items():
            if name in found:
                raise RecipeError(f"two preset files are named {name!r}: {found[name][0].file}, {pattern.file}")
            found[name] = (pattern, point)
    return found


def presets() -> list[str]:
    """Every preset's name."""
    return list(_names())


def preset_text(name: str) -> str:
    """The recipe of a preset as YAML, numbers filled in."""
    if name not in _names():
        raise RecipeError(f"there is no preset {name!r}{near(name)}")
    pattern, point = _names()[name]
    values = {key: str(value) for key, value in point.items()}
    if "group" in point:
        values["finer"] = finer(point["group"])
    return string.Template(pattern.text).substitute(values)


def finer(group: int) -> str:
    """What stands behind `else` after a group: half of it, and so on down to `LEAST`, then a whole channel."""
    sizes = []
    while group > LEAST:
        group //= 2
        sizes.append(f"group:{group}")
    return " else ".join([*sizes, "channel"])


@cache
def _preset(name: str) -> Plan:
    return parse(preset_text(name), name)


def near(name: str) -> str:
    """A hint for a mistyped preset: the nearest name, or where to look."""
    hint = nearest(name, presets())
    return hint if "did you mean" in hint else " ('regauge explain' lists them)"


def load(recipe: str | Path) -> Plan:
    """A preset by its name, or a recipe file by its path, or the recipe inside an artifact, which must not name code.

    A name that is a preset's is never read as a path; nor are several with `+` between them, which are combined.
    """
    name = str(recipe)
    if name in _names():
        return _preset(name)
    several = [piece.strip() for piece in name.split(BETWEEN)]
    if len(several) > 1 and any(piece in _names() for piece in several):
        return combined([load(piece) for piece in several])
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and path.parent == Path() and not path.exists():
        elsewhere = known_elsewhere(name)
        raise RecipeError(elsewhere or f"there is no preset {name!r}{near(name)}; a recipe file ends in .yaml")
    if path.is_dir() and (path / "regauge" / "recipe.yaml").is_file():
        path = path / "regauge" / "recipe.yaml"
    of_artifact = path.parts[-2:] == ("regauge", "recipe.yaml")
    if of_artifact:
        ordinary(path.parent.parent, RecipeError)
    if not path.exists():
        raise RecipeError(f"there is no recipe file {name}")
    return parse(read_text(path, RecipeError), path.name, trusted=not of_artifact)
