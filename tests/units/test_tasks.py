"""`measure --tasks`: questions by hand, against transformers' own logits, and against lm-eval where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from regauge.api import measure as python
from regauge.engine import apply, harness, measure, scoring
from regauge.errors import ModelError, TextError
from regauge.measure import compare as module
from regauge.measure import tasks
from regauge.measure.tasks import Likelihood, Pair, Question
from regauge.text.windows import Windows
from tests import tiny
from tests.units.test_measure_compare import a_model, subject

ASKED = (
    ("The quick brown", [" fox", " dog", " lazy jumps"], 0),
    ("over the lazy", [" dog", " fox"], 1),
    ("jumps over ", ["the", "lazy quick"], 1),
    ("The lazy dog", [" jumps", " over", " quick", " the"], 2),
    ("quick", [" brown", " fox jumps"], 0),
    ("the lazy dog", [" fox", " quick"], 1),
)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({"prompt": p, "choices": c, "answer": a}) for p, c, a in ASKED]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are tested elsewhere."""
    monkeypatch.setattr(module, "memory", lambda *_: None)
    monkeypatch.setattr(module, "bandwidth", lambda **_: 1e9)
    monkeypatch.setattr(module, "_speeds", lambda *_: ({"decode": {}, "prefill": {}}, {}, {}))


def test_likelihoods_by_hand() -> None:
    """The toy finds the token that it has just read the likeliest of seven: e² against six times 1."""
    same, other = 2 - math.log(math.exp(2) + 6), -math.log(math.exp(2) + 6)
    ids = ([3, 1, 1, 2, 2], [1, 1], [4, 4, 4])
    windows = Windows(tuple(torch.tensor(one) for one in ids), (0, 1, 2), (0, 0, 0))
    found = tasks.likelihoods(subject("toy", 2.0, 0), windows, [2, 1, 1], 8)
    assert [one.nats for one in found] == pytest.approx([2 * same + other, same, 2 * same], rel=1e-5)
    assert [one.greedy for one in found] == [False, True, True]


def test_a_long_choice_is_not_worse_for_being_long() -> None:
    one = Question(prompt="a", choices=[" bc", " bcdefgh"], answer=1)
    found = [Likelihood(-2.0, False), Likelihood(-4.0, False)]
    assert tasks.right([one], found).tolist() == [1.0]  # 2 / 3 nats a character against 4 / 8
    assert tasks.right([one], [Likelihood(-1.0, False), Likelihood(-7.0, False)]).tolist() == [0.0]


def test_a_difference_is_drawn_question_by_question() -> None:
    """Two models that are right on the same questions differ by nothing, whichever questions are drawn."""
    marks = np.array([1.0, 0.0] * 10)
    found = tasks.score("t", "acc", {"a": marks, "b": marks, "c": 1 - marks}, 0)
    assert (found.value["a"].value, found.questions, found.told) == (0.5, 20, True)
    assert (found.against["b"].low, found.against["b"].high) == (0.0, 0.0)
    assert found.against["c"].low < 0 < found.against["c"].high
    assert set(found.against) == {"b", "c"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 of .* is no question"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "answer: Field required"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2, of 2 choices"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "choices"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "a choice is empty"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 0, "gold": 1}', "gold"),
    ],
)
def test_what_is_no_question_is_told_by_its_line(line: str, said: str, task: Path) -> None:
    first = task.read_text(encoding="utf-8").splitlines()[0]
    task.write_text(f"{first}\n{line}\n", encoding="utf-8")
    with pytest.raises(TextError, match=said):
        tasks.questions(task)


def test_files_that_hold_no_task(tmp_path: Path, task: Path) -> None:
    with pytest.raises(TextError, match=r"gone.jsonl cannot be read: No such file"):
        scoring.wanted(str(tmp_path / "gone.jsonl"))
    task.write_text("\n", encoding="utf-8")
    with pytest.raises(TextError, match="holds no question"):
        scoring.wanted(task)
    task.write_bytes(b"\xff\xfe")
    with pytest.raises(TextError, match="it is not UTF-8"):
        scoring.wanted([str(task)])


def test_a_name_without_lm_eval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TextError, match=r"'arc_easy' is no file, and lm-eval.*pip install 'regauge\[tasks\]'"):
        scoring.wanted("arc_easy")


def test_a_question_that_is_too_long_or_too_short_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    with pytest.raises(TextError, match=r"is [0-9]+ tokens, and the model reads 4 at once"):
        tasks.encoded([Pair("The quick brown fox", " jumps")], tokenizer, 4, 0)
    windows, starts = tasks.encoded([Pair("The quick brown fox", " jumps")], tokenizer, 8, 0, shorten=True)
    assert tokenizer.decode(windows.ids[0].tolist()[starts[0] :]) == " jumps"
    assert len(windows.ids[0]) == 8
    with pytest.raises(TextError, match="leaves no token before ' jumps'"):
        tasks.encoded([Pair("The quick brown fox", " jumps")], tokenizer, 4, 0, shorten=True)


def test_accuracy_is_that_of_transformers_own_logits(task: Path, tmp_path: Path, quick: None) -> None:
    """The source's answers are counted again with the library's model, a choice at a time and nothing padded."""
    source = a_model("llama", tmp_path / "source")
    apply("rtn-w8", source, tmp_path / "made")
    found = measure([source, tmp_path / "made"], eval=[tiny.TEXT * 3] * 2, tasks=f"{task}")
    (score,) = found.tasks
    tokenizer = tiny.tokenizer()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    right = 0
    for prompt, choices, answer in ASKED:
        scores = []
        for choice in choices:
            before, ids = len(tokenizer.encode(prompt.rstrip(" "))), tokenizer.encode(prompt + choice)
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            nats = sum(float(log_p[place - 1, ids[place]]) for place in range(before, len(ids)))
            scores.append(nats / len(choice))
        right += scores.index(max(scores)) == answer
    assert score.questions == len(ASKED)
    assert score.metric == "acc_norm"
    assert score.value["source"].value == pytest.approx(right / len(ASKED))
    assert set(score.against) == {"made"}


def test_both_worlds_answer_the_same_and_the_screen_says_so(
    task: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from regauge.cli import main

    source = a_model("llama", tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT * 9, encoding="utf-8")
    words = ["measure", str(source), "--eval", str(text), "--tasks", str(task), "-q"]
    assert main([*words, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["tasks"]
    (same,) = python(source, eval=str(text), tasks=[str(task)], quiet=True).tasks
    assert told == same.model_dump(mode="json")
    assert main(words) == 0
    assert f"mine.jsonl, source: acc_norm {same.value['source'].value:.3f}" in capsys.readouterr().out


def test_models_without_next_tokens_are_refused(task: Path, tmp_path: Path, quick: None) -> None:
    source = a_model("bert", tmp_path / "source")
    with pytest.raises(ModelError, match="tasks are scored by next tokens, and source gives embeddings"):
        measure([source], eval=[tiny.TEXT * 3] * 2, tasks=task)


def test_of_what_lm_eval_logs_one_figure_of_the_first_filter_is_taken() -> None:
    logged = [
        {"doc_id": 1, "filter": "none", "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0},
        {"doc_id": 0, "filter": "none", "metrics": ["acc", "acc_norm"], "acc": 0.0, "acc_norm": 1.0},
        {"doc_id": 0, "filter": "strict", "metrics": ["acc", "acc_norm"], "acc": 0.0, "acc_norm": 0.5},
    ]
    assert harness.metric(logged) == "acc_norm"
    assert harness.values(logged).tolist() == [1.0, 0.0]
    assert harness.metric([{"doc_id": 0, "metrics": ["f1"], "f1": 0.5}]) == "f1"


needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval brings 60 packages: pip install 'regauge[tasks]'"
)


@needs_lm_eval
@pytest.mark.slow
def test_a_name_that_lm_eval_does_not_know_or_cannot_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TextError, match=r"lm-eval has no task 'arc_eazy' \(did you mean 'arc_easy'\?\)"):
        scoring.wanted("arc_eazy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(TextError, match=r"the data of the task 'arc_easy' cannot be fetched"):
        scoring.wanted("arc_easy")


MINE = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {path}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@needs_lm_eval
@pytest.mark.slow
def test_a_file_and_the_same_task_of_lm_eval_give_the_same_answers(
    task: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "mine.yaml").write_text(MINE.format(path=task), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path / "table"))
    monkeypatch.setattr(harness, "_manager", lambda: manager)
    source = a_model("llama", tmp_path / "source")
    ours, theirs = measure([source], eval=[tiny.TEXT * 3] * 2, tasks=f"{task},mine").tasks
    assert (theirs.task, theirs.metric, theirs.questions) == ("mine", "acc_norm", len(ASKED))
    assert ours.value == theirs.value
