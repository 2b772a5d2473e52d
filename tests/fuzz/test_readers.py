"""Whatever stands in a small file, its reader gives what it is for, or one sentence of its own error: never another.

Seeds (`@example`) are faults that were found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from regauge.artifact import files
from regauge.artifact.codec import patterns
from regauge.artifact.ownership import is_artifact, strangers
from regauge.documents import read_json
from regauge.errors import ArtifactError, ModelError, RecipeError, RegaugeError, TextError, one_line
from regauge.hosts.transformers.configs import read_raw
from regauge.plan import parse
from regauge.search import record
from regauge.text.corpora import corpus

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just("os:system")
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["model_type", "weight_map", "files", "regauge", "text", "num_layers", "x"]), inner
        ),
    ),
    max_leaves=10,
)
WORDS = ["weights", "rules", "inputs", "blocks.*", "grid", "int4", "grain", "channel", "name", "part", "mine:X", "full"]
MARKS = ["{", "}", "[", "]", ":", ",", "\n", " ", "&a", "*a", "!!int", "'", "|", "-", "2001-99-99", "0x1", "~", "\0"]


def put(path: Path, raw: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw), encoding="utf-8", errors="surrogatepass")
    return path


@QUICK
@given(JSON)
@example("[" * 100_000)
@example({"x": "\ud800"})
@example({"x": [[[[]]] * 3]})
@example("9" * 100_000)
def test_json(tmp_path: Path, raw: Any) -> None:
    try:
        found = read_json(put(tmp_path / "x.json", raw), ArtifactError)
    except ArtifactError as error:
        told = str(error)
    else:
        assert type(found) is dict
        return
    assert "x.json" in told


@QUICK
@given(JSON)
@example({"weight_map": 0})
@example({"weight_map": {"a": "../x.safetensors"}})
@example({"weight_map": {"a": ["b"]}})
def test_indices(tmp_path: Path, raw: Any) -> None:
    put(tmp_path / files.INDEX, raw)
    try:
        found = files.weight_map(tmp_path)
    except ArtifactError:
        return
    assert all((tmp_path / name).parent == tmp_path for name in found.values())


@QUICK
@given(JSON)
@example({"model_type": "llama", "num_hidden_layers": 10**9})
@example({"model_type": "llama", "text_config": {"num_labels": 10**10}})
@example({"model_type": "llama", "transformers_weights": "../x.safetensors"})
def test_configs(tmp_path: Path, raw: Any) -> None:
    put(tmp_path / "config.json", raw)
    try:
        found = read_raw(tmp_path)
    except ModelError:
        return
    assert type(found["model_type"]) is str
    assert "transformers_weights" not in found or found["transformers_weights"] is None


@QUICK
@given(JSON)
@example({"files": [["x"]]})
@example({"files": "mine.txt"})
@example("[" * 100_000)
def test_lists_of_what_is_ours(tmp_path: Path, raw: Any) -> None:
    """A list that cannot be read makes nothing ours."""
    put(tmp_path / "regauge" / "manifest.json", raw)
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    assert not is_artifact(tmp_path) or "mine.txt" in strangers(tmp_path)


@QUICK
@given(JSON)
@example({"points": [], "chosen": 7})
def test_run_records(tmp_path: Path, raw: Any) -> None:
    with pytest.raises(ArtifactError):
        record.read(put(tmp_path / "run.json", raw))


@QUICK
@given(st.lists(st.sampled_from([*WORDS, *MARKS]), max_size=25).map("".join))
@example("weights: {'*': {grid: !!int a, grain: channel}}")
@example("weights: {'*': {grid: 2001-99-99, grain: channel}}")
@example("weights: {'*': {grid: !!python/name:os.system , grain: channel}}")
@example("name: 1" + ":59" * 4000)
@example("name: 0x" + "f" * 20_000)
@example("name: &a [*a]")
@example("!!int")
def test_recipes(text: str) -> None:
    for trusted in (True, False):
        try:
            parse(text, trusted=trusted)
        except RecipeError:
            continue


@QUICK
@given(st.lists(st.one_of(JSON.map(json.dumps), st.text(max_size=9)), max_size=4))
@example(["\ufeff", '{"text": "\\ud800"}'])
@example(['{"text": 1' + "0" * 5000 + "}"])
@example(["[" * 100_000])
def test_lines_of_json(tmp_path: Path, lines: list[str]) -> None:
    try:
        found = corpus(put(tmp_path / "x.jsonl", "\n".join(lines)))
    except TextError:
        return
    assert all(document.size for document in found.documents)


@QUICK
@given(st.text(alphabet="ab.*+?()[]{}|\\^$0123,-", max_size=40))
@example("([a-z._0-9]+)*X$")
@example("a?" * 60 + "a" * 60)
@example("(?P<x>a)(?P=x)")
def test_patterns(text: str) -> None:
    try:
        patterns.matches(text, "model.layers.0.self_attn.q_proj" * 6)
    except ArtifactError:
        return


@QUICK
@given(st.text(max_size=60))
@example("\ud800\x1b[2J\r\n\u202e")
@example("x" * 100_000)
def test_messages(text: str) -> None:
    """Whatever a message quotes, it is one line that every terminal bears."""
    told = str(RegaugeError(text))
    told.encode()
    assert len(told.splitlines()) <= 1
    assert len(told) < 5000
    assert one_line(told) == told
