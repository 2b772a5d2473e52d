"""What explain and methods say of how fast a token is behind a row of caches."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from regauge.plan import presets
from regauge.report.explanation import explain
from regauge.report.methods import methods
from regauge.report.speeds import sentence, slower_below, told

KEPT = json.loads((files("regauge") / "presets" / "speed.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("times", "below", "said"),
    [
        ({}, 0, ""),
        (
            {1024: 1.0, 16384: 1.84},
            0,
            "no slower than bf16 from 1024 tokens on, where measuring began; 1.8 times",
        ),
        ({1024: 1.1, 4096: 0.97, 16384: 1.2}, 16384, "slower than bf16 below 16384 tokens; 1.2 times as fast"),
        ({1024: 0.8, 4096: 0.5}, None, "slower than bf16 at 4096 tokens, the longest measured (0.5 times as fast)"),
    ],
)
def test_where_a_row_is_slower(times: dict[int, float], below: int | None, said: str) -> None:
    assert slower_below(times) == below
    assert sentence(times).startswith(said)
    assert sentence(times) or not times


def test_explain_and_methods_tell_it() -> None:
    for name in KEPT["rows"]:
        assert name in presets()
        assert told(name)
    name = next(iter(KEPT["rows"]))
    assert "speed" in explain(name)
    assert " ".join(explain(name).split()).count(told(name)) == 1
    assert any(f"{name}: a token {told(name)}" in one.measured for one in methods(name))


def test_a_row_that_was_not_timed_says_nothing() -> None:
    assert told("gptq-w4g128") == ""
    assert "  speed" not in explain("gptq-w4g128")
