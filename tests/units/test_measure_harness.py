"""lm-eval tasks from local files; the run itself needs the extra."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from regauge.errors import TextError
from regauge.measure.harness import evaluate, tasks

TASK = """
task: last-word
dataset_path: json
dataset_kwargs: {data_files: questions.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""


def task(folder: Path) -> Path:
    path = folder / "task.yaml"
    path.write_text(TASK)
    questions = [
        {"question": "Once upon a time there was a little", "choices": [" girl", " qxz"], "answer": 0},
        {"question": "The dog was very", "choices": [" zzkk", " happy"], "answer": 1},
        {"question": "They went to the", "choices": [" park", " vrtx"], "answer": 0},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return path


def test_data_lies_beside_its_task(tmp_path: Path) -> None:
    (config,) = tasks([task(tmp_path)])
    assert config["dataset_kwargs"] == {"data_files": str(tmp_path / "questions.jsonl")}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read as a task"), ("a: [", "cannot be read as a task"), ("task: x", "is no lm-eval task")],
)
def test_what_is_no_task_says_so(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(TextError, match=message):
        tasks([tmp_path / "t.yaml"])


def test_without_the_extra_the_way_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TextError, match=r"pip install 'regauge\[lm-eval\]'"):
        evaluate(None, None, [task(tmp_path)])


def test_a_local_task_runs(shared: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is an extra, and it is not installed here")
    from regauge.hosts.transformers.load import load
    from regauge.hosts.transformers.source import read_tokenizer

    path = shared / "models" / "stories-260k"
    (found,) = [r for r in evaluate(load(path), read_tokenizer(path), [task(tmp_path)]) if r.metric == "acc"]
    assert (found.task, found.value, found.samples) == ("last-word", 1.0, 3)
