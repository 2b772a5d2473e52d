"""Decoding by the length of the context: every token reads the cache, so a long one is slower than the first ones.

Each model's cache is filled with random ids, in pieces, and then all of them decode in turn, a token at a time, until
the context has the length that is told. A length that the models do not read, or that takes longer or more
memory than it may, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regauge.measure.cost import Model, Speed, Thunk, interleave

LENGTHS = (1024, 4096, 16384)
STEPS, WARM, PIECE = 12, 2, 512  # tokens timed, tokens before that do not count, tokens of a piece of the prompt
MOST = 20.0
"""Seconds that one length may take."""
CACHES = 1 << 30
"""Bytes that the caches of all models together may take."""

Speeds = Mapping[str, Mapping[str, Speed]]
Can = Callable[[str, float], bool]
"""What is asked for, by name, and its seconds → whether there is time."""


def at_lengths(
    models: Mapping[str, Model], vocabulary: int, most: int | None, known: Speeds, can: Can, a_token: float = 0.0
) -> dict[str, dict[int, Speed]]:
    """Model → length of the context in tokens → tokens a second, all models interleaved.

    Args:
        most: tokens that the models read at once; None: it is not known.
        known: `decode` and `prefill` of every model at a short context, by which seconds are foreseen.
        can: is asked before each length, those above `MOST` seconds or `CACHES` bytes apart.
        a_token: bytes that a token takes in the caches of all models together.
    """
    found: dict[str, dict[int, Speed]] = {name: {} for name in models}
    for length in LENGTHS:
        if (most is not None and length > most) or length * a_token > CACHES:
            break
        takes = sum(seconds(length, known, name) for name in models)
        if takes > MOST or not can(f"speed at {length // 1024}k of context", takes):
            break
        for name, speed in at_length(models, vocabulary, length).items():
            found[name][length] = speed
    return found


def seconds(length: int, known: Speeds, name: str) -> float:
    """What one length takes, foreseen from the speeds of a short context: attention grows, so half as much again."""
    return 1.5 * (length / known["prefill"][name].median + (STEPS + WARM) / known["decode"][name].median)


def at_length(models: Mapping[str, Model], vocabulary: int, length: int) -> dict[str, Speed]:
    """Tokens a second of each model, of the last tokens before the context is `length` long."""
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocabulary, (1, length), generator=draw, dtype=torch.int64, device="cpu")
    ready = {name: _filled(model, ids_BT) for name, model in models.items()}
    return interleave(ready, STEPS, WARM)


def _filled(model: Model, ids_BT: Tensor) -> Thunk:
    """Fills a cache but for the tokens that are timed; each call decodes one of them, and gives tokens a second."""
    begin = ids_BT.shape[1] - STEPS - WARM
    cache: Any = None  # of the host
    with torch.inference_mode():
        for piece_BT in torch.split(ids_BT[:, :begin], PIECE, dim=1):
            cache = model(input_ids=piece_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    left = iter(torch.split(ids_BT[:, begin:], 1, dim=1))

    def run() -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            model(input_ids=next(left), past_key_values=cache, use_cache=True)
            return 1 / (time.perf_counter() - start)

    return run
