"""How a transformers model is timed, for every peer that is one: decoding token by token, and prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """A streamer that notes when each token came; `generate` hands it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ids: list[int] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        self.times.append(time.perf_counter())
        self.ids += value.reshape(-1).tolist()

    def end(self) -> None:
        pass


def a_token(times: list[float]) -> float:
    """Seconds a token, the first not counted: it pays for the prompt."""
    return (times[-1] - times[0]) / (len(times) - 1)


def generating(model: Any, prompt: list[int], tokens: int, facts: dict[str, Any]) -> Callable[[], list[float]]:
    """Greedy `generate`."""
    ids = torch.tensor([prompt])

    def run() -> list[float]:
        clock = Clock()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
        )
        facts["ids"] = clock.ids
        return [a_token(clock.times)]

    return run


def prefilling(model: Any, prompt: list[int]) -> Callable[[], list[float]]:
    """One forward pass over the prompt that fills a cache and gives the last token's logits."""
    ids = torch.tensor([prompt])

    def run() -> list[float]:
        with torch.inference_mode():
            start = time.perf_counter()
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return [time.perf_counter() - start]

    return run


def timed(model: Any, options: dict[str, Any], facts: dict[str, Any]) -> Callable[[], list[float]]:
    """`route` is `prefill`, or `generate`."""
    if options["route"] == "prefill":
        return prefilling(model, options["prompt"])
    return generating(model, options["prompt"], options["tokens"], facts)
