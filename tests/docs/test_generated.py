"""What is drawn or written from the code is what the code says now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_axes_is_current() -> None:
    assert (ROOT / "docs" / "axes.svg").read_text(encoding="utf-8") == script("draw_axes").draw(), (
        "run python scripts/draw_axes.py"
    )


@pytest.mark.slow  # nine seconds: the skeletons of eighty architectures
def test_the_family_pages_are_current() -> None:
    assert script("write_family_pages").main(["--check"]) == 0, "run python scripts/write_family_pages.py"


def test_the_axis_pages_are_current() -> None:
    assert script("write_axis_pages").main(["--check"]) == 0, "run python scripts/write_axis_pages.py"


def test_the_reference_and_the_choice_are_current() -> None:
    assert script("write_reference").main(["--check"]) == 0, "run python scripts/write_reference.py"
