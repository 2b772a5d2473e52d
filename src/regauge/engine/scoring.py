"""`measure --tasks`: files of questions by our own reading, and tasks of lm-eval by its harness.

Everything is read and refused before any model runs. A model's likelihoods come from the same `Subject` that its
quality is measured on: a plain checkpoint block by block, an artifact as it is packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from regauge.engine import harness
from regauge.errors import ModelError
from regauge.measure import tasks
from regauge.measure.bootstrap import Floats
from regauge.measure.compare import batch_tokens
from regauge.measure.subject import Facts, Subject
from regauge.measure.tasks import Likelihood, Pair, Question, Score
from regauge.text.tokens import Tokenizer


@dataclass(frozen=True)
class Wanted:
    """What was asked for: files with their questions, and names of lm-eval."""

    files: tuple[tuple[str, tuple[Question, ...]], ...]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Reader:
    """One model, as it is asked for likelihoods."""

    subject: Subject
    tokenizer: Tokenizer
    facts: Facts

    def __call__(self, some: Sequence[Pair], shorten: bool = False) -> list[Likelihood]:
        """In the order of the pairs."""
        rows = self.facts.vocabulary
        windows, starts = tasks.encoded(some, self.tokenizer, self.facts.most, rows, shorten)
        return tasks.likelihoods(self.subject, windows, starts, batch_tokens(rows))


def wanted(names: str | Path | Sequence[str]) -> Wanted:
    """Reads files, and has lm-eval find and fetch what the other names stand for.

    Raises:
        TextError: a file is no task; a name is none of lm-eval's, cannot be fetched, or is not scored by likelihood.
    """
    every = tasks.named(str(names) if isinstance(names, Path) else names)
    paths = [name for name in every if name.endswith(tasks.ENDING) or Path(name).is_file()]
    files = tuple((name, tasks.questions(Path(name).expanduser())) for name in paths)
    rest = tuple(name for name in every if name not in paths)
    if rest:
        harness.check(rest)
    return Wanted(files, rest)


def scores(
    asked: Wanted, subjects: Sequence[Subject], tokenizer: Tokenizer, seed: int, say: Callable[[str, str], None]
) -> tuple[Score, ...]:
    """Every task for every model.

    Raises:
        ModelError: a model does not predict next tokens.
        TextError: a question is longer than a model reads.
    """
    marks: dict[tuple[str, str], dict[str, Floats]] = {}
    for subject in subjects:
        say("measure", f"tasks, {subject.name}")
        facts = subject.facts()
        if not facts.generative:
            raise ModelError(
                f"tasks are scored by next tokens, and {subject.name} gives {facts.gives}; leave --tasks out."
            )
        read = Reader(subject, tokenizer, facts)
        for name, some in asked.files:
            right = tasks.right(some, read(tasks.pairs(some)))
            marks.setdefault((name, tasks.METRIC), {})[subject.name] = right
        for (name, metric), found in harness.marks(asked.names, read).items() if asked.names else ():
            marks.setdefault((name, metric), {})[subject.name] = found
    return tuple(tasks.score(name, metric, found, seed) for (name, metric), found in marks.items())
