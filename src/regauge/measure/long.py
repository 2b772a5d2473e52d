"""Long generation: how long a compressed model says what the original says, and whether what it loses grows.

The original writes on greedily behind some prompts. What it wrote is then read by every model: the prompt at once, the
rest in pieces behind what the model has kept, as decoding would have it. Up to the first token where a model's own
choice is another than the original's, both have read the same, so that is where their continuations part. KL is taken
along the whole of it: a cache that loses more with every token shows in the last quarter.

Where tokens are let go, what stays depends on what the choice could see. So the end of real texts is scored too, twice:
with the choice made behind the whole prompt, whose last tokens stand for a question, and before those.

Cost: as many decoding steps of the original as tokens are written, all prompts at once, and a forward pass of each
model over them. Legend: B prompts, P tokens of a prompt, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from regauge.errors import ModelError, SettingError, TextError
from regauge.kernels.cpu.machine import trim
from regauge.measure.cost import RUNTIME, Model
from regauge.measure.quality import CHUNK, divergence
from regauge.measure.subject import Batch, Facts, Reader, Subject
from regauge.text.windows import Windows

PROMPTS, PROMPT = 4, 256
"""Prompts that are continued, and the most tokens of one: it is a quarter of what a model reads at the most."""
QUESTION = 32
"""Tokens at the end of a prompt that stand for a question."""
PARTS = 4
"""Stretches of the continuation whose KL is told apart."""
ENDS = 8
"""Texts at the most whose ends are scored."""


class Long(BaseModel):
    """What one model makes of what the original wrote.

    Attributes:
        prompt, tokens: of each prompt, and of what the original wrote behind it.
        until: of each prompt, tokens before the model's own choice is another; `tokens` where it never is.
        kl: nats a token, the mean of all prompts, in each quarter of what was written.
        seen, unseen: nats a token of the end of real texts, tokens let go behind the whole prompt and before the
            question at its end; None where nothing is let go.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: int
    tokens: int
    until: tuple[int, ...]
    kl: tuple[float, ...]
    seen: float | None = None
    unseen: float | None = None

    @property
    def mean(self) -> float:
        """Tokens that both write alike, the mean of the prompts."""
        return sum(self.until) / len(self.until)

    @property
    def told(self) -> str:
        """A sentence for a person."""
        alike = f"{min(self.until):,} to {max(self.until):,} tokens alike, {self.mean:,.0f} in the mean"
        ends = "" if self.seen is None else (
            f"; KL behind a prompt whose tokens were let go with its last {QUESTION} in sight {self.seen:.4f}, "
            f"and before those {self.unseen:.4f}"
        )  # fmt: skip
        return (
            f"{len(self.until)} prompts of {self.prompt} tokens, continued greedily for {self.tokens:,}: {alike}; KL a "
            f"token {self.kl[0]:.4f} in the first quarter, {self.kl[-1]:.4f} in the last{ends}"
        )


@dataclass(frozen=True, eq=False)
class Written:
    """What the original wrote: (1, T) ids of each prompt and its continuation, and the tokens of a prompt."""

    texts: tuple[Tensor, ...]
    prompt: int

    @property
    def batches(self) -> list[Batch]:
        return [{"input_ids": ids_1T} for ids_1T in self.texts]


def refused(names: Sequence[str], found: Sequence[Facts], windows: Windows, tokens: int) -> None:
    """Refuses what cannot be done, before any is read.

    Raises:
        SettingError: no other model is to read what the first one writes, or there is no room for so much.
        ModelError: they write no text.
    """
    if not found[0].generative:
        raise ModelError(f"--long has the first model write text, and {names[0]} gives {found[0].gives}; leave it out.")
    if len(names) < 2:
        raise SettingError("--long tells what others make of what the first model writes; name another, or --cache")
    for facts in found:
        prompts(windows, tokens, facts.most)


def generations(
    subjects: Sequence[Subject], all_facts: Sequence[Facts], windows: Windows, tokens: int, dtype: torch.dtype
) -> dict[str, Long]:
    """Name → what each model but the first makes of what that one wrote, in a dtype; all are read in float32."""
    first, *others = subjects
    written = write(first.ways(dtype)[RUNTIME], prompts(windows, tokens, all_facts[0].most), tokens)
    trim()
    found: dict[str, Long] = {}
    for one, facts in zip(others, all_facts[1:], strict=True):
        told = along(first.outputs, one.outputs, written)
        ends = in_sight(first.outputs, one.outputs, windows) if facts.lets_go else None
        found[one.name] = told if ends is None else told.model_copy(update={"seen": ends[0], "unseen": ends[1]})
    return found


def prompts(windows: Windows, tokens: int, most: int | None) -> Tensor:
    """(B, P): the beginnings of windows, evenly spread over the text.

    Args:
        tokens: that are to be written.
        most: that the model reads at once; None: it does not say.

    Raises:
        SettingError: fewer than `PARTS` tokens are asked for, or more than fit behind a prompt.
        TextError: there is no window of two tokens.
    """
    if tokens < PARTS:
        raise SettingError(f"--long takes the tokens that the first model writes, {PARTS} or more; not {tokens}")
    size = room(windows, most)
    if most is not None and size + tokens > most:
        raise SettingError(
            f"--long {tokens} asks for more than the first model reads: {most:,} tokens at once, {size} of them a "
            f"prompt; write --long {most - size} or less"
        )
    whole = [ids for ids in windows.ids if len(ids) >= size]
    if size < 1 or not whole:
        raise TextError("the text has no tokens to begin a long generation with; give a longer one.")
    step = max(1, len(whole) // PROMPTS)
    return torch.stack([ids[:size] for ids in whole[::step][:PROMPTS]])


def room(windows: Windows, most: int | None) -> int:
    """Tokens of a prompt."""
    return min(PROMPT if most is None else min(PROMPT, max(1, most // 4)), max(map(len, windows.ids), default=0))


@torch.inference_mode()
def write(model: Model, prompts_BP: Tensor, tokens: int) -> Written:
    """The model's likeliest tokens behind some prompts, whatever ends a text passed over."""
    out = model(input_ids=prompts_BP, use_cache=True, logits_to_keep=1)
    found = [prompts_BP]
    for left in reversed(range(tokens)):
        found.append(out.logits[:, -1:].argmax(-1))
        if left:
            out = model(input_ids=found[-1], past_key_values=out.past_key_values, use_cache=True)
    return Written(tuple(torch.split(torch.cat(found, 1), 1)), prompts_BP.shape[1])


@torch.no_grad()
def along(original: Reader, other: Reader, written: Written) -> Long:
    """How a model reads what the original wrote."""
    until, kl = list[int](), list[Tensor]()
    for first_1TV, other_1TV in _both(original, other, written.batches, written.prompt):
        kl_T, same_T = _apart(first_1TV[0, written.prompt - 1 : -1], other_1TV[0, written.prompt - 1 : -1])
        until.append(int(same_T.cumprod(0).sum()))
        kl.append(torch.stack([part.mean() for part in kl_T.tensor_split(PARTS)]))
    quarters = tuple(float(value) for value in torch.stack(kl).mean(0))
    return Long(prompt=written.prompt, tokens=len(kl_T), until=tuple(until), kl=quarters)


@torch.no_grad()
def in_sight(original: Reader, other: Reader, windows: Windows) -> tuple[float, float] | None:
    """(seen, unseen), nats a token: the last eighth of the longest texts, tokens let go behind what precedes it, and
    before the last `QUESTION` of those. None where texts are too short for a question."""
    length = max(map(len, windows.ids))
    prompt = length - length // 8
    if prompt <= 2 * QUESTION:
        return None
    whole = [ids for ids in windows.ids if len(ids) == length][:ENDS]
    batches: list[Batch] = [{"input_ids": ids[None]} for ids in whole]
    found = []
    for chosen in (prompt, prompt - QUESTION):
        pairs = _both(original, other, batches, chosen)
        ends = [_apart(one[0, prompt - 1 : -1], two[0, prompt - 1 : -1])[0].mean() for one, two in pairs]
        found.append(float(torch.stack(ends).mean()))
    return found[0], found[1]


def _both(original: Reader, other: Reader, batches: Sequence[Batch], prompt: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(original(batches)(), other(batches, prompt)(), strict=True)


def _apart(first_TV: Tensor, other_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL, whether the likeliest token is the same) of each place, float32."""
    step = max(1, CHUNK // first_TV.shape[-1])
    found = [
        divergence(one.float().log_softmax(-1), two.float().log_softmax(-1))
        for one, two in zip(torch.split(first_TV, step), torch.split(other_TV, step), strict=True)
    ]
    kl_T, same_T = (torch.cat(part) for part in zip(*found, strict=True))
    return kl_T, same_T
