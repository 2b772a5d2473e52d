"""lm-eval tasks, as an extra: `pip install 'regauge[lm-eval]'`. Tasks are YAML files of your own, given by path.

    tasks.yaml:
        task: which-word
        dataset_path: json
        dataset_kwargs: {data_files: questions.jsonl}
        test_split: train
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"

Paths under `data_files` are read from the file's own directory. Nothing is downloaded unless a task asks. The model
is whatever `regauge.load` gave, so artifacts are measured packed, as they run.
Cost: a forward pass a choice.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from regauge.errors import TextError


class Result(BaseModel):
    """One metric of one task. Whether higher is better is the task's own affair."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


def tasks(paths: Sequence[str | Path]) -> list[dict[str, object]]:
    """Task files as lm-eval takes them; data files become absolute paths.

    Raises:
        TextError: no such file, or it is no task.
    """
    found = []
    for path in map(Path, paths):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise TextError(f"{path} cannot be read as a task: {str(error).splitlines()[0]}.") from error
        if not isinstance(config, dict) or "task" not in config or "output_type" not in config:
            raise TextError(f"{path} is no lm-eval task: a mapping with 'task' and 'output_type' is needed.")
        kwargs = config.get("dataset_kwargs", {})
        if "data_files" in kwargs:
            config["dataset_kwargs"] = {**kwargs, "data_files": _beside(path.parent, kwargs["data_files"])}
        found.append(config)
    return found


def evaluate(
    model: Any, tokenizer: Any, paths: Sequence[str | Path], limit: int | None = None, batch: int = 8
) -> list[Result]:
    """Scores of a loaded model on tasks given by path.

    Args:
        model, tokenizer: of the host, as loaded.
        limit: documents a task; None: all.

    Raises:
        TextError: lm-eval is not installed, or a task cannot be read.
    """
    configs = tasks(paths)
    try:
        harness = importlib.import_module("lm_eval")
        wrapper = importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise TextError(
            f"tasks need lm-eval, and it cannot be imported ({error}); run: pip install 'regauge[lm-eval]'."
        ) from error
    wrapped = wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = harness.simple_evaluate(
        model=wrapped, tasks=configs, limit=limit, bootstrap_iters=1000, log_samples=False, verbosity="ERROR"
    )
    return [result for name, metrics in found["results"].items() for result in _results(name, metrics, found)]


def _results(name: str, metrics: Mapping[str, Any], found: Mapping[str, Any]) -> list[Result]:
    """`acc,none` and `acc_stderr,none` → one result a metric."""
    samples = int(found.get("n-samples", {}).get(name, {}).get("effective", 0))
    results = []
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = metrics.get(f"{metric}_stderr,{kind}")
        stderr = float(error) if isinstance(error, int | float) else None
        results.append(Result(task=name, metric=metric, value=float(value), stderr=stderr, samples=samples))
    return results


def _beside(folder: Path, files: Any) -> Any:
    """Paths (one, a list, or a mapping of splits) seen from the task's directory."""
    if isinstance(files, str):
        return files if "://" in files else str((folder / files).resolve())
    if isinstance(files, Mapping):
        return {split: _beside(folder, inner) for split, inner in files.items()}
    return [_beside(folder, inner) for inner in files]
