"""Which drafts an artifact decodes with, chosen from measurements; "none" unless the gain is sure.

What guesses are worth is how often they are right, on text of the user's that the model writes on, and what a step of
one and more tokens and a guess take on this machine. Each way of drafting is replayed along those texts by the very
loop that decodes (`runtime/drafts/replay.py`), so that its length adapts as it will. The way is chosen on one set of
texts and its gain told on another: from the lower end of the interval over those texts and the rounds of timing. Last
it is run through `generate`, beside plain decoding.

Legend: N texts, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from regauge.measure.bootstrap import Draws, Interval, ratio
from regauge.measure.samples import sampled, written_on
from regauge.measure.several import Seconds, Together, beside
from regauge.runtime.drafts.replay import Passage, Replayed, Times, replayed
from regauge.runtime.drafts.worth import GAIN
from regauge.text.windows import Windows

LOOKUP, NONE = "lookup", "none"
PROMPT, NEW = 128, 48
"""Tokens that are given of each text, and that the model writes behind them."""
TEXTS, FEW = 16, 6
"""Texts of a set; those below which nothing is told."""
SHORT = 8
"""Tokens that a continuation has at the least, to count."""
RUN, TURNS = 6, 2
"""Texts that are run through `generate`, and how often each."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Way(_Record):
    """One way of drafting.

    Attributes:
        accepted: share of its guesses that were right, of those that were tried.
        tokens: of a step of the whole, in the mean.
        gain: times as many tokens a second as without, by what was accepted and what steps took; its interval is over
            texts and rounds of timing.
    """

    drafts: str
    accepted: float
    tokens: float
    gain: Interval


class Drafting(_Record):
    """The choice, and what it was made from.

    Attributes:
        drafts: as a request says it; `none`.
        why: in words.
        text: what was written on, in words; `how` the model chose its tokens.
        texts: how many the gains are told on; as many others chose.
        steps: a step of 1, 2, … tokens in times of one of one token, medians.
        ways: what was weighed.
        measured: the gain of what was chosen through `generate`, interleaved with plain decoding.
    """

    drafts: str = NONE
    why: str = ""
    text: str = ""
    how: str = ""
    texts: int = 0
    steps: tuple[float, ...] = ()
    ways: tuple[Way, ...] = ()
    measured: Interval | None = None

    def __str__(self) -> str:
        """`1.12x from look-up (accepted 38 % of guesses on TEXT)`, or why there are none."""
        way = self.way
        if way is None:
            return f"no drafts: {self.why}"
        name = {LOOKUP: "look-up"}.get(self.drafts, self.drafts)
        gain = way.gain if self.measured is None else self.measured
        return f"{gain.value:.2f}x from {name} (accepted {100 * way.accepted:.0f} % of guesses on {self.text})"

    @property
    def way(self) -> Way | None:
        """What was chosen."""
        return next((way for way in self.ways if way.drafts == self.drafts), None)

    @property
    def gain(self) -> float:
        """Times as many tokens a second as without drafts: 1 where there are none."""
        return 1.0 if self.measured is None or self.drafts == NONE else self.measured.value


def refused(why: str, text: str = "") -> Drafting:
    """No drafts, for a reason."""
    return Drafting(why=why, text=text)


def weighed(
    model: Any,
    members: Mapping[str, Any],
    windows: tuple[Windows, Windows],
    rounds: Sequence[Together],
    most: int | None,
    names: Sequence[str] | None = None,
) -> Drafting:
    """The choice for a loaded model.

    Args:
        members: name → a member of the model that may draft for it.
        windows: of the text that chooses, and of the text that the gain is told on.
        rounds: what steps and guesses take, by `measure.several.together`.
        most: tokens that the model reads at once.
        names: ways that are weighed; None: look-up and all members.
    """
    text = windows[1].description.partition(": ")[2] or windows[1].description
    sets = [passages(model, some, most) for some in windows]
    if min(map(len, sets)) < FEW:
        return refused(
            f"{' and '.join(str(len(some)) for some in sets)} continuations of the text are too few to tell what "
            f"guesses are worth: give a text of {2 * FEW} stretches of {PROMPT} tokens or more",
            text,
        )
    wanted = [LOOKUP, *members] if names is None else list(names)
    ways, first = list[Way](), dict[str, float]()
    for name in wanted:
        likely = [None if name == LOOKUP else likeliest(members[name], some) for some in sets]
        chosen, told = (
            replays(some, _times(rounds, name, len(some)), found) for some, found in zip(sets, likely, strict=True)
        )
        first[name] = sum(one.plain for one in chosen) / sum(one.taken for one in chosen)
        ways.append(_way(name, told))
    best = max(ways, key=lambda way: first[way.drafts])
    sure = first[best.drafts] > 1 and best.gain.low > GAIN
    near = f"{best.drafts} promises {best.gain.value:.2f}x ({best.gain.low:.2f} to {best.gain.high:.2f})"
    ones = np.median(np.array([one.steps for one in rounds]), 0)
    return Drafting(
        drafts=best.drafts if sure else NONE,
        why=near if sure else f"{near}, and drafts are used where {GAIN:.2f}x is sure",
        text=text,
        how=sampled(model),
        texts=len(sets[1]),
        steps=tuple(float(one) for one in ones / ones[0]),
        ways=tuple(ways),
    )


def run(
    model: Any,
    found: Drafting,
    windows: Windows,
    most: int | None,
    turns: int = TURNS,
    clock: Seconds = time.perf_counter,
) -> Drafting:
    """The choice with its gain through `generate`; none where that is no faster."""
    if found.drafts == NONE:
        return found
    prompts = _prompts(windows, most, RUN)
    pairs = beside(model, [prompt[None] for prompt in prompts], _new(prompts, most), found.drafts, turns, clock)
    plain, drafted = (np.array([getattr(pair, name) for pair in pairs]) for name in ("plain", "drafted"))
    gain = ratio(plain, drafted, Draws.make(len(pairs)))
    if not all(pair.same for pair in pairs):
        return found.model_copy(update={"drafts": NONE, "why": f"{found.drafts} changed the text"})
    if gain.low <= 1:
        said = (
            f"{found.why}, and through generate it is no faster: {gain.value:.2f}x ({gain.low:.2f} to {gain.high:.2f})"
        )
        return found.model_copy(update={"drafts": NONE, "why": said, "measured": gain})
    return found.model_copy(update={"measured": gain})


def stretches(windows: Windows, most: int | None) -> int:
    """How many prompts a text has, up to as many as are used."""
    return len(_prompts(windows, most, TEXTS))


def passages(model: Any, windows: Windows, most: int | None) -> list[Passage]:
    """Texts as the model writes them on."""
    prompts = _prompts(windows, most, TEXTS)
    if not len(prompts):
        return []
    length = prompts.shape[1]
    found = written_on(model, prompts, _new(prompts, most))
    return [
        Passage((*given, *more), length)
        for given, more in zip(prompts.tolist(), found, strict=True)
        if len(more) >= SHORT
    ]


def likeliest(model: Any, some: Sequence[Passage]) -> list[list[int]]:
    """A model's likeliest token behind each token of each text."""
    found = []
    with torch.inference_mode():
        for one in some:
            ids_1T = torch.tensor([one.ids], dtype=torch.int64, device="cpu")
            found.append(model(input_ids=ids_1T, use_cache=False).logits[0].argmax(-1).tolist())
    return found


def replays(some: Sequence[Passage], times: Sequence[Times], likely: Sequence[Sequence[int]] | None) -> list[Replayed]:
    """Each text by its own times."""
    return [replayed(one, times[place], None if likely is None else likely[place]) for place, one in enumerate(some)]


def _times(rounds: Sequence[Together], name: str, count: int) -> list[Times]:
    """So many times what steps and guesses take: medians of as many rounds as there are, drawn with replacement."""
    draws = np.random.default_rng(0).integers(0, len(rounds), (count, len(rounds)))
    found = []
    for drawn in draws:
        some = [rounds[turn] for turn in drawn]
        steps = np.median([one.steps for one in some], 0)
        guesses = [one.guesses[name] for one in some if name in one.guesses]
        found.append(Times(tuple(map(float, steps)), float(np.median(guesses)) if guesses else None))
    return found


def _way(name: str, told: Sequence[Replayed]) -> Way:
    drafted, steps = sum(one.drafted for one in told), sum(one.steps for one in told)
    accepted = sum(one.accepted for one in told)
    plain, taken = (np.array([getattr(text, what) for text in told]) for what in ("plain", "taken"))
    return Way(
        drafts=name,
        accepted=accepted / max(1, drafted),
        tokens=1 + accepted / max(1, steps),
        gain=ratio(plain, taken, Draws.make(len(told))),
    )


def _new(prompts: Tensor, most: int | None) -> int:
    """Tokens that are written behind them."""
    return NEW if most is None else min(NEW, most - prompts.shape[1])


def _prompts(windows: Windows, most: int | None, count: int) -> Tensor:
    """(N, T): stretches of as many documents and windows as there are, all of one length."""
    length = PROMPT if most is None else min(PROMPT, most // 2)
    length = min(length, max((len(ids) for ids in windows.ids), default=0))
    turn: dict[int, int] = {}
    order = []
    for place, (ids, document) in enumerate(zip(windows.ids, windows.document, strict=True)):
        for start in range(0, len(ids) - length + 1 if length else 0, length or 1):
            turn[document] = turn.get(document, -1) + 1
            order.append((turn[document], place, start))
    kept = [windows.ids[place][start : start + length] for _, place, start in sorted(order)[:count]]
    return torch.stack(kept) if kept else torch.zeros(0, length, dtype=torch.int64, device="cpu")
