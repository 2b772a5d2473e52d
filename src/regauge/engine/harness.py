"""lm-eval's tasks (EleutherAI's harness, `pip install 'regauge[tasks]'`), asked through our own reading of a model.

The harness builds prompts and counts; likelihoods come from us. What it would have a model write is refused, since
greedy text is no likelihood. It is imported when a name of its is asked for, and nothing of it changes this process:
no seeds are set.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from regauge.errors import TextError, nearest
from regauge.measure.bootstrap import Floats
from regauge.measure.tasks import Likelihood, Pair

KINDS = ("loglikelihood", "multiple_choice")
"""What it asks of a model in tasks that we score."""
METRICS = ("acc_norm", "acc")
"""Which figure of a question is taken, the first that it has; else the first of the task's own."""
Ask = Callable[[Sequence[Pair], bool], list[Likelihood]]


def check(names: Sequence[str]) -> None:
    """Finds and fetches the tasks.

    Raises:
        TextError: lm-eval is not installed, has no such task, cannot fetch one, or one needs generated text.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise TextError(
            f"{names[0]!r} is no file, and lm-eval, which knows tasks by name, is not installed; run: "
            "pip install 'regauge[tasks]', or give a .jsonl of prompt, choices and answer."
        )
    manager = _manager()
    for name in names:
        if name not in manager.all_tasks:
            hint = nearest(name, manager.all_tasks)  # where none is near it names all, which are thousands
            raise TextError(f"lm-eval has no task {name!r}{hint if len(hint) < 200 else ''}.")
        try:
            found = manager.load([name])["tasks"]
        except Exception as error:  # whatever the library that fetches raises
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise TextError(
                f"the data of the task {name!r} cannot be fetched ({first}); fetch it where there is a network, or "
                "give a .jsonl of prompt, choices and answer."
            ) from error
        for task in found.values():
            if task.OUTPUT_TYPE not in KINDS:
                raise TextError(
                    f"the task {name!r} has the model write ({task.OUTPUT_TYPE}), and measure scores by likelihood "
                    "alone; take a task with choices."
                )


def marks(names: Sequence[str], ask: Ask) -> Mapping[tuple[str, str], Floats]:
    """(task, metric) → what each question gave, in the order of its data."""
    from lm_eval import simple_evaluate

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    found: Any = simple_evaluate(
        model=_model(ask), tasks=list(names), task_manager=_manager(), bootstrap_iters=0, log_samples=True, **seeds
    )
    return {(task, metric(some)): values(some) for task, some in found["samples"].items()}


def metric(samples: Sequence[Mapping[str, Any]]) -> str:
    """Which figure of a question is told."""
    known = list(samples[0].get("metrics") or [])
    return next((one for one in METRICS if one in samples[0]), known[0] if known else METRICS[-1])


def values(samples: Sequence[Mapping[str, Any]]) -> Floats:
    """(Q,): that figure of each question; of several filters of an answer, the first."""
    name, first = metric(samples), samples[0].get("filter")
    of_first = [one for one in samples if one.get("filter") == first]
    return np.array([float(one[name]) for one in sorted(of_first, key=lambda one: one["doc_id"])], dtype=np.float64)


@cache
def _manager() -> Any:
    """Its index of tasks, which takes a second or more to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _model(ask: Ask) -> Any:
    """A model as the harness knows one."""
    from lm_eval.api.model import LM

    def loglikelihood(_: Any, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        found = ask([Pair(*one.args) for one in requests], True)
        return [(one.nats, one.greedy) for one in found]

    def refused(_: Any, requests: Sequence[Any]) -> Any:
        raise TextError("a task has the model write, and measure scores by likelihood alone; take one with choices.")

    ways = {"loglikelihood": loglikelihood, "loglikelihood_rolling": refused, "generate_until": refused}
    return type("Likelihoods", (LM,), ways)()
