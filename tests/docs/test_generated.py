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


def test_the_page_of_sizes_is_current_and_scales_what_was_measured() -> None:
    sizes = script("write_sizes")
    assert sizes.main(["--check"]) == 0, "run python scripts/write_sizes.py"
    assert sizes.line([(1.0, 10.0), (3.0, 20.0)], 5.0) == 30.0
    tiny = sizes.Size({"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "vocab_size": 10})  # fmt: skip
    assert (tiny.block, tiny.blocks, tiny.table, tiny.cache) == (120, 240, 40, 16)


def test_the_reference_and_the_choice_are_current() -> None:
    assert script("write_reference").main(["--check"]) == 0, "run python scripts/write_reference.py"
