"""Tasks: questions with choices, each answered by the choice that the model finds likeliest.

    {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}

A choice is scored by the log-likelihood of its tokens behind the prompt, divided by its characters (lm-eval's
`acc_norm`): a long choice is not worse for being long. Higher = better. Intervals are over questions, which all models
answer, so a difference is drawn pair by pair. Cost: one forward pass of each model over every prompt and choice.
Legend: Q questions, P pairs of prompt and choice, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from regauge.errors import TextError
from regauge.measure.bootstrap import FEW, Draws, Floats, Interval, ratio
from regauge.measure.subject import Subject
from regauge.text.tokens import Tokenizer, frame, within
from regauge.text.windows import Windows

ENDING = ".jsonl"
METRIC = "acc_norm"
EXAMPLE = '{"prompt": "…", "choices": ["…", "…"], "answer": 0}'


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Question(_Record):
    """One line of a task. `answer` is the index of the right choice, from 0."""

    prompt: str = Field(min_length=1)
    choices: list[str] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Question:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer is {self.answer}, of {len(self.choices)} choices counted from 0")
        if not all(self.choices):
            raise ValueError("a choice is empty")
        return self


class Score(BaseModel):
    """One task for all models, by name.

    Attributes:
        questions: how many each model answered.
        metric: what is counted of a question.
        value: its mean, a share where it is an accuracy.
        against: that of a model less that of the first, on the same questions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    questions: int
    metric: str
    value: dict[str, Interval]
    against: dict[str, Interval]

    @property
    def told(self) -> bool:
        """Whether there are enough questions for an interval over them."""
        return self.questions >= FEW


Marks = Mapping[str, Floats]
"""Model → (Q,): what each question gave, all models on the same questions."""


@dataclass(frozen=True)
class Pair:
    """What is scored: a text and what comes behind it."""

    prompt: str
    behind: str


@dataclass(frozen=True)
class Likelihood:
    """Of what comes behind: log-likelihood in nats, and whether each token of it was the likeliest."""

    nats: float
    greedy: bool


def questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file, one JSON object a line.

    Raises:
        TextError: it cannot be read; says the line and what is wrong with it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise TextError(f"the task {path} cannot be read: {why}.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(Question.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise TextError(
                f"line {number} of {path} is no question: {where}: {first['msg']}; a line is {EXAMPLE}."
            ) from error
    if not found:
        raise TextError(f"{path} holds no question; a line of it is {EXAMPLE}.")
    return tuple(found)


def pairs(some: Sequence[Question]) -> list[Pair]:
    """Prompt and choice, question by question."""
    return [Pair(one.prompt, choice) for one in some for choice in one.choices]


def right(some: Sequence[Question], found: Sequence[Likelihood]) -> Floats:
    """(Q,): 1 where the likeliest choice a character is the answer."""
    rest, marks = iter(found), []
    for one in some:
        scores = [next(rest).nats / len(choice) for choice in one.choices]
        marks.append(float(int(np.argmax(scores)) == one.answer))
    return np.array(marks, dtype=np.float64)


def encoded(
    some: Sequence[Pair], tokenizer: Tokenizer, most: int | None, rows: int, shorten: bool = False
) -> tuple[Windows, list[int]]:
    """Windows, and at which token of each the scored part begins; spaces at the end of a prompt go behind it, since
    tokenizers join them to the next word.

    Args:
        most: tokens that the model reads at once.
        rows: of its table of embeddings.
        shorten: the head of a text that is too long is left out, instead of a refusal.

    Raises:
        TextError: a prompt with its choice is longer than what the model reads at once; or has a token it lacks.
    """
    ids, starts, head = [], [], frame(tokenizer)[0]
    for one in some:
        before = [*head, *tokenizer.encode(one.prompt.rstrip(" "), add_special_tokens=False)]
        whole = [*head, *tokenizer.encode(one.prompt + one.behind, add_special_tokens=False)]
        start = min(len(before), len(whole) - 1)
        if most is not None and len(whole) > most:
            if not shorten:
                long = f"{one.prompt[:40]!r} with a choice is {len(whole):,} tokens"
                raise TextError(f"{long}, and the model reads {most:,} at once; shorten it.")
            start, whole = start - (len(whole) - most), whole[-most:]
        if start < 1:
            raise TextError(f"{one.prompt[:40]!r} leaves no token before {one.behind[:40]!r}, so it cannot be scored.")
        ids.append(torch.tensor(whole, dtype=torch.int64, device="cpu"))
        starts.append(start)
    within(ids, rows, tokenizer)
    return Windows(tuple(ids), tuple(range(len(ids))), (0,) * len(ids)), starts


@torch.no_grad()
def likelihoods(subject: Subject, windows: Windows, starts: Sequence[int], tokens: int) -> list[Likelihood]:
    """Of each window from its start on, in order.

    Args:
        tokens: most tokens of a batch, padding counted.
    """
    order = sorted(range(len(starts)), key=lambda index: len(windows.ids[index]))  # alike lengths pad least
    sorted_ = Windows(tuple(windows.ids[i] for i in order), tuple(range(len(order))), (0,) * len(order))
    batches = list(sorted_.batches(tokens))
    given = subject.outputs([{"input_ids": batch.ids_BT} for batch in batches])()
    found: dict[int, Likelihood] = {}
    places = iter(order)
    for batch, logits_BTV in zip(batches, given, strict=True):
        for row, length in enumerate(batch.lengths):
            place = next(places)
            part = slice(starts[place] - 1, length - 1)
            next_T = batch.ids_BT[row, starts[place] : length]
            logits_TV = logits_BTV[row, part].float()
            nats = torch.log_softmax(logits_TV, dim=-1).gather(-1, next_T[:, None]).sum()
            found[place] = Likelihood(float(nats), bool((logits_TV.argmax(-1) == next_T).all()))
    return [found[index] for index in range(len(starts))]


def score(task: str, metric: str, marks: Marks, seed: int) -> Score:
    """Means and differences to the first model, intervals over questions.

    Args:
        marks: the first of them is what the others are held to.
    """
    first = next(iter(marks))
    count = len(marks[first])
    draws, ones_Q = Draws.make(count, seed), np.ones(count, dtype=np.float64)
    return Score(
        task=task,
        questions=count,
        metric=metric,
        value={name: ratio(one_Q, ones_Q, draws) for name, one_Q in marks.items()},
        against={name: ratio(one_Q - marks[first], ones_Q, draws) for name, one_Q in marks.items() if name != first},
    )


def named(names: str | Sequence[str]) -> tuple[str, ...]:
    """`mine.jsonl,arc_easy` → its names, each once."""
    parts: Iterator[str] = iter(names.split(",")) if isinstance(names, str) else iter(names)
    return tuple(dict.fromkeys(one.strip() for one in parts if one.strip()))
