"""What reading several tokens at once costs, which is what drafts live by; and what they gave, through `generate`.

Everything is interleaved, round by round, so that a slow minute hits all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regauge.measure.cost import PROMPT, Model, Thunk, in_turn
from regauge.measure.samples import drawn_by

STEPS = 12
"""Of one timing, at the most."""
Seconds = Callable[[], float]


@dataclass(frozen=True)
class Together:
    """What drafting takes, in one round of timing.

    Attributes:
        steps: seconds of a step that reads 1, 2, … tokens.
        guesses: member → seconds of a token by it.
    """

    steps: tuple[float, ...]
    guesses: Mapping[str, float]


def steps_rate(model: Model, prompt_BT: Tensor, each: int, clock: Seconds, steps: int) -> Thunk:
    """Steps a second that read `each` tokens behind the prompt and what the steps before them read."""

    def run() -> float:
        with torch.inference_mode():
            out = model(input_ids=prompt_BT, use_cache=True)
            start = clock()
            for _ in range(steps):
                out = model(input_ids=prompt_BT[:, :each], past_key_values=out.past_key_values, use_cache=True)
            return steps / (clock() - start)

    return run


def together(
    model: Model,
    members: Mapping[str, Model],
    prompt_BT: Tensor,
    most: int,
    rounds: int,
    clock: Seconds = time.perf_counter,
) -> list[Together]:
    """Steps of 1 … `most` tokens of a model, and a token of each member, round by round.

    Args:
        clock: in seconds; of the processor where others are busy.
    """
    short = prompt_BT[:, :PROMPT]
    each = [str(tokens) for tokens in range(1, most + 1)]
    room = 2 * prompt_BT.shape[1] - PROMPT  # that a model reads behind them, which reads twice the prompt at once
    runs = {
        tokens: steps_rate(model, short, int(tokens), clock, max(1, min(STEPS, room // int(tokens)))) for tokens in each
    }
    runs |= {f"={name}": steps_rate(member, short, 1, clock, STEPS) for name, member in members.items()}
    rates = in_turn(runs, rounds)
    return [
        Together(
            steps=tuple(1 / rates[tokens][turn] for tokens in each),
            guesses={name: 1 / rates[f"={name}"][turn] for name in members},
        )
        for turn in range(rounds)
    ]


@dataclass(frozen=True)
class Beside:
    """One prompt written on with drafts and without.

    Attributes:
        plain, drafted: seconds, the least of the rounds.
        same: whether it is the same text.
    """

    plain: float
    drafted: float
    same: bool


def beside(
    model: nn.Module,
    prompts: Sequence[Tensor],
    tokens: int,
    drafts: str,
    rounds: int = 2,
    clock: Seconds = time.perf_counter,
) -> list[Beside]:
    """Each prompt (1, T) written on through `generate`, with drafts and without them in turn."""
    found = []
    for ids_1T in prompts:
        took: dict[str | None, list[float]] = {None: [], drafts: []}
        texts: dict[str | None, Tensor] = {}
        for _ in range(rounds):
            for asked, seconds in took.items():
                start = clock()
                texts[asked] = _written(model, ids_1T, tokens, asked)
                seconds.append(clock() - start)
        found.append(Beside(min(took[None]), min(took[drafts]), texts[None].equal(texts[drafts])))
    return found


def _written(model: nn.Module, ids_1T: Tensor, tokens: int, drafts: str | None) -> Tensor:
    """As the model's generation settings say; what is sampled is so by one seed."""
    generate: Any = model.generate
    settings: Any = model.generation_config
    more: dict[str, Any] = {} if drafts is None else {"drafts": drafts}
    padding = 0 if settings.pad_token_id is None else settings.pad_token_id
    with drawn_by(0), torch.inference_mode():
        out: Tensor = generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=tokens, pad_token_id=padding, **more
        )
    return out
