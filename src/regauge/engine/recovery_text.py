"""What a recovery reads, and how many steps it takes: the user's text in two parts that share no stretch, windows to
train on and windows held out; or windows that the original samples from itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regauge.artifact.staging import Staging
from regauge.engine.watchdog import Clock
from regauge.errors import TextError
from regauge.hosts import host_of
from regauge.hosts.base import Source
from regauge.text.calibration import Calibration, draw
from regauge.text.corpora import Corpus, Where, corpus
from regauge.text.length import asked_length
from regauge.text.split import pieces, split
from regauge.text.tokens import within

BATCH = 1024  # tokens of a step
STEPS, MOST = 256, 4096  # of a run without a time, and of one with any
HELD_OUT = 8192  # tokens that are never trained on, where the text is long enough
SHARE = 0.1  # of the text that they come from
SAMPLED = 32768  # tokens that a model samples from itself at most
LOOKS = 8  # at the windows held out, in all
SPARE = 0.85  # of the time that is planned for
OWN = "self-sampled"


@dataclass(frozen=True)
class Amounts:
    """What the user says of how much is done.

    Attributes:
        tokens: to train on at most; length: of a window; steps: of the optimiser. None: as there is text and time.
        time: seconds that the command may take, or None.
    """

    tokens: int | None = None
    length: int | None = None
    steps: int | None = None
    time: float | None = None

    @property
    def told(self) -> dict[str, object]:
        return {"tokens": self.tokens, "length": self.length, "steps": self.steps, "time": self.time}


@dataclass(frozen=True, eq=False)
class Material:
    """The text of a recovery, opened and checked, not cut yet.

    Attributes:
        given: what the user gave; None: the original samples its own.
        first, second: stretches to train on and stretches held out.
        length: tokens of a window.
    """

    given: Corpus | None
    first: tuple[str, ...]
    second: tuple[str, ...]
    length: int
    seed: int

    @property
    def identity(self) -> dict[str, object]:
        kind = {"kind": OWN} if self.given is None else {"kind": "text", "sha256": self.given.sha256}
        return {**kind, "length": self.length}


def material(source: Source, text: Where | None, amounts: Amounts, seed: int) -> Material:
    """Opens and splits the text.

    Raises:
        TextError: it cannot be used, is too short to hold any out, or its windows are longer than the model reads.
        ModelError: the original has no tokenizer.
    """
    source.tokenizer()
    length = asked_length(amounts.length, source.parameters(), host_of(source.path).context(source))
    if text is None:
        return Material(None, (), (), length, seed)
    given = corpus(text)
    stretches = list(dict.fromkeys(pieces(given)))
    if len(stretches) < 4:
        raise TextError(
            f"{given.description} has {len(stretches)} stretches, too few to hold some out and train on the others; "
            "give a longer text."
        )
    second, first = split(stretches, (SHARE, 1 - SHARE), seed)
    return Material(given, tuple(first), tuple(second), length, seed)


def held_out(found: Material, source: Source, staging: Staging, clock: Clock) -> Calibration:
    """The windows that are never trained on."""
    if found.given is None:
        ids_NT = _sampled(found, source, staging, clock)
        return Calibration(ids_NT[: max(1, len(ids_NT) // 8)], OWN, kind=OWN)
    return _drawn(found, source, found.second, HELD_OUT)


def to_train_on(found: Material, source: Source, staging: Staging, clock: Clock, tokens: int) -> Calibration:
    """Windows to train on, `tokens` of them at most."""
    if found.given is None:
        ids_NT = _sampled(found, source, staging, clock)
        ids_NT = ids_NT[max(1, len(ids_NT) // 8) :]
        return Calibration(ids_NT[: max(1, tokens // found.length)], OWN, kind=OWN)
    return _drawn(found, source, found.first, tokens)


def _drawn(found: Material, source: Source, stretches: tuple[str, ...], tokens: int) -> Calibration:
    assert found.given is not None, "a text was given"
    windows = draw(corpus(list(stretches)), source.tokenizer(), tokens, found.length, found.seed)
    within([windows.inputs], source.anatomy.site("embed").shape[0], source.tokenizer())
    return Calibration(windows.inputs, found.given.description)


def _sampled(found: Material, source: Source, staging: Staging, clock: Clock) -> Tensor:
    """Windows that the original samples, once: a resumed run finds them."""
    kept = staging.kept(OWN)
    if kept is not None:
        return kept["ids"]
    clock.say("text", "no text was given: the original samples its own; text of your own kind is better")
    ids_NT, _ = host_of(source.path).sample(
        source,
        source.tokenizer(),
        max(16, SAMPLED // found.length),
        found.length,
        found.seed,
        lambda done, total: clock.show("text", done, total),
    )
    staging.keep(OWN, {"ids": ids_NT})
    return ids_NT


@dataclass(frozen=True)
class Pace:
    """Seconds that were measured before any is planned.

    Attributes:
        heard: of the original, a token; step: of a training step; look: of a look at the windows held out.
    """

    heard: float
    step: float
    look: float

    def steps(self, left: float, batch: int, tokens: int) -> int:
        """How many steps there is time for, of `batch` tokens, on a text of at most `tokens`."""
        spare = left * SPARE - (LOOKS + 2) * self.look
        both = int(spare / (self.step + batch * self.heard))
        if both * batch > tokens:  # the text is read more than once, and the original hears it once
            both = int((spare - tokens * self.heard) / self.step)
        return max(1, min(MOST, both))


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes, the second time."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def batches(windows: Calibration) -> list[Tensor]:
    """Windows, several to a batch of at most `BATCH` tokens."""
    return list(torch.split(windows.inputs, max(1, BATCH // windows.inputs.shape[1])))
