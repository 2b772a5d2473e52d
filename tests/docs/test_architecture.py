"""The page on the architecture says what the code is: its tree, its picture, and every name on it."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest

from tests.docs.test_generated import script

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
OTHERS = (".py", ".md", ".yaml", ".json", ".svg", ".partial"), ("rg.", "model.", "config.")
"""What names end and begin with that are files, or what a user calls."""
NAMES = [
    name
    for name in sorted(set(re.findall(r"`((?:[A-Za-z_]+\.)+[A-Za-z_]+)`", PAGE)))
    if not name.endswith(OTHERS[0]) and not name.startswith(OTHERS[1])
]
house = script("draw_house")


def test_the_picture_is_current() -> None:
    assert (ROOT / "docs" / "house.svg").read_text(encoding="utf-8") == house.draw(), "run python scripts/draw_house.py"


def test_the_tree_is_what_is_there() -> None:
    tree = re.search(r"```\nsrc/regauge/\n(.*?)```", PAGE, re.DOTALL)
    assert tree is not None
    told = {line.split()[0].rstrip("/").removesuffix(".py") for line in tree[1].splitlines()}
    assert told == house.packages() | {"presets"}


def test_every_import_goes_down_a_layer() -> None:
    rank = {name: number for number, row in enumerate(house.layers()) for name in row}
    assert rank.keys() == house.packages(), "a package has no layer in pyproject.toml"
    up = [f"{name} imports {one}" for name, some in house.imports().items() for one in some if rank[one] <= rank[name]]
    assert not up


def test_the_picture_sees_imports_behind_type_checking() -> None:
    tree = house.ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from regauge.cli import main\n")
    assert list(house._named(tree)) == ["cli"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_the_page_is_there(name: str) -> None:
    assert pydoc.locate(f"regauge.{name}" if not name.startswith("Staging.") else f"regauge.artifact.staging.{name}")


@pytest.mark.parametrize(
    "package", sorted({*house.packages()} - {"hosts", "api", "cli", "engine", "search", "ranking", "report"})
)
def test_below_the_hosts_no_model_library_is_known(package: str) -> None:
    paths = [*(ROOT / "src" / "regauge" / package).rglob("*.py"), ROOT / "src" / "regauge" / f"{package}.py"]
    for path in filter(Path.exists, paths):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (transformers|regauge\.hosts)\b", text, re.MULTILINE), path


def test_no_file_is_longer_than_300_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / "src").rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 300
    }
    assert not long
