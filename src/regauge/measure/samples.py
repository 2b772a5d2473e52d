"""The same prompts continued by two models, greedily: what the figures mean in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.inference_mode()
def continuations(model: nn.Module, tokenizer: Any, prompts: Sequence[str], tokens: int = 48) -> list[str]:
    """Greedy continuation of each prompt, through the model's own `generate`; the prompt is not repeated.

    `tokenizer` is the host's: `encode`, `decode`. Cost: one prefill and `tokens` steps a prompt.
    """
    generate: Any = model.generate
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device="cpu")
        out = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """While it lasts, `generate` samples by a seed: by torch's own generator, which is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def written_on(model: nn.Module, ids_BT: Tensor, tokens: int, seed: int = 0) -> list[list[int]]:
    """What a model writes behind texts of one length, as its generation settings say: greedily, or sampled by a seed.

    Each ends with the token that ends a text, where one came. Cost: one prefill and `tokens` steps of them all.
    """
    generate: Any = model.generate
    settings: Any = model.generation_config
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    padding = settings.pad_token_id
    with drawn_by(seed), torch.inference_mode():
        out = generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=tokens,
            pad_token_id=padding if padding is not None else ends[0] if ends else 0,
        )
    found = []
    for row in out[:, ids_BT.shape[1] :].tolist():
        stops = [place for place, token in enumerate(row) if token in ends]
        found.append(row[: stops[0] + 1] if stops else row)
    return found


def sampled(model: nn.Module) -> str:
    """How a model chooses its next token by its generation settings: `greedily`, or `sampled at temperature 0.7`."""
    settings: Any = model.generation_config
    if not settings.do_sample:
        return "greedily"
    heat = settings.temperature
    return f"sampled at temperature {1.0 if heat is None else heat:g}"
