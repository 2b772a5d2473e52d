"""Decoding by the length of the context: what each call reads, which lengths are measured, and how it is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from regauge.measure.contexts import STEPS, WARM, at_length, at_lengths, seconds
from regauge.measure.cost import Speed
from regauge.report.words import contexts


def a_speed(rate: float) -> Speed:
    return Speed(median=rate, low=rate, high=rate, rounds=1)


class Counts:
    """A model whose cache is the number of tokens that it has read."""

    def __init__(self, name: str, calls: list[tuple[str, int, int]]) -> None:
        self.name, self.calls = name, calls

    def __call__(self, input_ids: Any, past_key_values: list[int] | None, **_: Any) -> Any:
        cache = past_key_values if past_key_values is not None else [0]
        self.calls.append((self.name, cache[0], input_ids.shape[1]))
        cache[0] += input_ids.shape[1]
        return SimpleNamespace(past_key_values=cache, logits=torch.zeros(1, 1, 4))


def test_the_cache_is_filled_in_pieces_and_the_models_decode_in_turn_up_to_the_length() -> None:
    calls: list[tuple[str, int, int]] = []
    found = at_length({name: Counts(name, calls) for name in "ab"}, 100, 1024)
    assert calls[:4] == [("a", 0, 512), ("a", 512, 1024 - 512 - STEPS - WARM), ("b", 0, 512), ("b", 512, 498)]
    assert calls[4:8] == [("a", 1010, 1), ("b", 1010, 1), ("a", 1011, 1), ("b", 1011, 1)]
    assert calls[-1] == ("b", 1023, 1)
    assert {name: speed.rounds for name, speed in found.items()} == {"a": STEPS, "b": STEPS}


def test_lengths_that_are_too_long_or_for_which_there_is_no_time_are_left_out() -> None:
    models = {"a": Counts("a", [])}
    fast = {"decode": {"a": a_speed(1e6)}, "prefill": {"a": a_speed(1e6)}}
    slow = {"decode": {"a": a_speed(1e6)}, "prefill": {"a": a_speed(16384 / 15)}}
    asked: list[str] = []

    def can(what: str, takes: float) -> bool:
        asked.append(f"{what}: {takes:.3f}")
        return len(asked) < 3

    assert list(at_lengths(models, 100, None, fast, lambda *_: True)["a"]) == [1024, 4096, 16384]
    assert list(at_lengths(models, 100, 16383, fast, lambda *_: True)["a"]) == [1024, 4096]
    assert list(at_lengths(models, 100, None, slow, lambda *_: True)["a"]) == [1024, 4096]  # 22.5 s
    assert list(at_lengths(models, 100, None, fast, lambda *_: True, 2**30 / 16383)["a"]) == [1024, 4096]
    assert list(at_lengths(models, 100, None, fast, can)["a"]) == [1024, 4096]
    assert asked == [f"speed at {k}k of context: {1.5 * (k * 1024 + 14) / 1e6:.3f}" for k in (1, 4, 16)]
    assert seconds(2000, {"decode": {"a": a_speed(7)}, "prefill": {"a": a_speed(1000)}}, "a") == 6.0


def test_how_it_is_told() -> None:
    assert contexts({1024: a_speed(118.4), 4096: a_speed(1250)}) == "1k 118, 4k 1,250 tokens a second"
    assert contexts({}) == ""
