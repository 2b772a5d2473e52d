"""Patterns out of somebody else's config.json: what is usual matches, what could take for ever is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regauge.artifact.codec.patterns import matches, pattern
from regauge.errors import ArtifactError

NAMES = ["model.layers.3.self_attn.q_proj", "model.layers.12.mlp.down_proj", "lm_head", "model.embed_tokens"]
USUAL = [
    r".*lm_head",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$",
    r"^model\.layers\.(?:0|1|12)\.mlp\.[a-z_]+_proj",
    r"^(?!.*lm_head).*",
    r"model.layers.[0-9]{1,2}.*",
    r".*\.(gate|up|down)_proj$",
]


@pytest.mark.parametrize("text", USUAL)
def test_usual_patterns_match_as_python_does(text: str) -> None:
    assert [matches(text, name) for name in NAMES] == [re.match(text, name) is not None for name in NAMES]


@pytest.mark.parametrize(
    "text",
    [
        "([a-z._0-9]+)*X$",
        "(a|a)*b",
        "(?:a+)+b",
        "a*a*a*a*a*b",
        "(a)\\1",
        "(?P<x>a)(?P=x)",
        "(?<=a)b",
        "(a",
        "a)",
        "[a",
        "*",
        "a{2}{3}",
        "a{9999}",
        "x" * 501,
        "(" * 400,
        "[0--]",
        "[[a]",
        "[a&&b]",
        "[a~~b]",
        "[a||b]",
    ],
)
def test_what_could_take_long_or_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="names modules by"):
        pattern(text)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab.*+?()|[]{}^$\\\\0129,:=!<>PxX-", max_size=30))
def test_whatever_is_taken_is_quick(text: str) -> None:
    try:
        made = pattern(text)
    except ArtifactError:
        return
    began = time.process_time()
    made.match("a" * 200)
    assert time.process_time() - began < 2
