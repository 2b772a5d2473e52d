"""What a model costs on this machine: tokens a second, and memory that is read, not computed from shapes.

Speeds are medians over interleaved rounds (A B A B …), so that a slow minute hits both; the spread is the quartiles.
Where the spreads of two models overlap, the verdict is "no faster". A speed-up is told in its parts: what compression
gave, against the same runtime on the uncompressed source, and what the runtime gave, which is that source against the
model library's own modules. Memory is the anonymous resident set of a fresh
process after loading; cache bytes a token are read from the cache's tensors.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from regauge.errors import ModelError

Thunk = Callable[[], float]
Model = Callable[..., Any]
"""A loaded causal model of a host: `input_ids`, `past_key_values`, `use_cache` → `logits`, `past_key_values`."""
Speeds = Mapping[str, Mapping[str, "Speed"]]
"""`decode` and `prefill` → model → speed."""

DECODE, PREFILL, PROMPT = 24, 256, 16  # tokens timed, tokens of a prefill, tokens before decoding
ORIGINAL, RUNTIME, COMPRESSED = "original", "runtime", "compressed"
"""The source by its library's own modules; the source as an artifact is run; the artifact."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Speed(_Record):
    """Tokens a second: median, quartiles, and how many rounds."""

    median: float
    low: float
    high: float
    rounds: int


class Memory(_Record):
    """Resident bytes of a fresh process that loaded the model and ran one token."""

    anonymous: int  # RssAnon with the model, less that of the same process without it
    file: int  # RssFile gained: pages of mapped weight files
    process: int  # RssAnon of the whole process, libraries and all


class Costs(_Record):
    """Everything measured about the cost of one model.

    Attributes:
        decode_at: tokens of context → decoding behind them; `decode` is behind `PROMPT`.
    """

    decode: Speed | None = None
    prefill: Speed | None = None
    decode_at: dict[int, Speed] = Field(default_factory=dict)
    memory: Memory | None = None
    cache_bytes: float | None = None  # a token
    bytes: int | None = None  # weight files on disk


class Gain(_Record):
    """A speed-up in its parts: `1.52x`, `no faster`, or `0.80x, slower`.

    Attributes:
        compression: against the same runtime on the uncompressed source.
        runtime: that source by this runtime, against its library's own modules.
        both: against the library's own modules.
    """

    compression: str
    runtime: str | None = None
    both: str | None = None


def speed(rates: Sequence[float]) -> Speed:
    """Median and quartiles of tokens a second."""
    if len(rates) > 1:
        low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
    else:
        low = high = rates[0]
    return Speed(median=statistics.median(rates), low=low, high=high, rounds=len(rates))


def verdict(first: Speed, second: Speed) -> str:
    """The first against the second: `1.52x`, `0.80x, slower`, or `no faster` where spreads overlap."""
    if first.low <= second.high and second.low <= first.high:
        return "no faster"
    ratio = first.median / second.median
    return f"{ratio:.2f}x" if ratio > 1 else f"{ratio:.2f}x, slower"


def gain(compressed: Speed | None, runtime: Speed | None, own: Speed | None) -> Gain | None:
    """A speed-up in its parts; None where one of the first two was not measured."""
    if compressed is None or runtime is None:
        return None
    if own is None:
        return Gain(compression=verdict(compressed, runtime))
    return Gain(compression=verdict(compressed, runtime), runtime=verdict(runtime, own), both=verdict(compressed, own))


def gains(costs: Mapping[str, Costs]) -> dict[str, Gain]:
    """`decode` and `prefill` of the artifact in their parts, where all three were measured."""
    own, runtime, made = (costs.get(name, Costs()) for name in (ORIGINAL, RUNTIME, COMPRESSED))
    found = {
        "decode": gain(made.decode, runtime.decode, own.decode),
        "prefill": gain(made.prefill, runtime.prefill, own.prefill),
    }
    return {name: told for name, told in found.items() if told is not None}


def interleave(runs: Mapping[str, Thunk], rounds: int = 5, warm: int = 1) -> dict[str, Speed]:
    """Each run once a round, in turn; `warm` rounds first that do not count."""
    return {name: speed(values) for name, values in in_turn(runs, rounds, warm).items()}


def in_turn(runs: Mapping[str, Thunk], rounds: int = 5, warm: int = 1) -> dict[str, list[float]]:
    """What each run gave, round by round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm + rounds):
        for name, run in runs.items():
            rate = run()
            if turn >= warm:
                rates[name].append(rate)
    return rates


def decode_rate(model: Model, prompt_BT: Tensor, tokens: int = 32) -> Thunk:
    """Greedy tokens a second with the cache, after the prompt is in it; batch as given (1 for decoding)."""

    def run() -> float:
        with torch.inference_mode():
            out = model(input_ids=prompt_BT, use_cache=True)
            next_B1 = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for _ in range(tokens):
                out = model(input_ids=next_B1, past_key_values=out.past_key_values, use_cache=True)
                next_B1 = out.logits[:, -1:].argmax(-1)
            return tokens / (time.perf_counter() - start)

    return run


def prefill_rate(model: Model, prompt_BT: Tensor) -> Thunk:
    """Prompt tokens a second through one forward pass that fills a cache and gives the last token's logits."""

    def run() -> float:
        with torch.inference_mode():
            start = time.perf_counter()
            model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
            return prompt_BT.numel() / (time.perf_counter() - start)

    return run


def prompt_of(vocabulary: int, most: int | None) -> Tensor:
    """Random ids (1, T) to time with: a prefill's worth, or half of what the model reads at once."""
    length = PREFILL if most is None else min(PREFILL, most // 2)
    return torch.randint(
        0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu"
    )


def speeds(models: Mapping[str, Model], prompt_BT: Tensor, rounds: int) -> dict[str, dict[str, Speed]]:
    """`decode` and `prefill` of every model, all of them interleaved in each round."""
    short = prompt_BT[:, :PROMPT]
    return {
        "decode": interleave({name: decode_rate(model, short, DECODE) for name, model in models.items()}, rounds),
        "prefill": interleave({name: prefill_rate(model, prompt_BT) for name, model in models.items()}, rounds),
    }


def cache_bytes(cache: Any) -> int:  # any cache object of the host
    """Bytes of all tensors that the layers of a cache hold: keys, values, scales, indices, whatever is there."""
    storages: dict[int, int] = {}
    held = 0
    for layer in cache.layers:
        own = getattr(layer, "bytes", None)
        if type(own) is int:  # a store of ours counts itself
            held += own
            continue
        for value in vars(layer).values():
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return held + sum(storages.values())


def cache_bytes_a_token(model: Model, prompt_BT: Tensor) -> float:
    """Growth of the cache from half the prompt to all of it, a token: fixed parts (a window's rest) drop out."""
    length = prompt_BT.shape[1]
    if length < 2:
        raise ModelError("reading the cache's growth needs a prompt of two tokens or more.")
    with torch.inference_mode():
        half = cache_bytes(model(input_ids=prompt_BT[:, : length // 2], use_cache=True).past_key_values)
        whole = cache_bytes(model(input_ids=prompt_BT, use_cache=True).past_key_values)
    return (whole - half) / (length - length // 2) / prompt_BT.shape[0]


_CHILD = """
import gc, json, sys
import psutil
import torch
from regauge import load
from regauge.kernels.cpu.machine import anonymous_bytes, trim
def resident():
    gc.collect()
    trim()
    anonymous = anonymous_bytes()
    return [anonymous, psutil.Process().memory_info().rss - anonymous]
def ready():
    model = load(sys.argv[1], dtype=None if sys.argv[2] == "stored" else getattr(torch, sys.argv[2]))
    (name, shape), = json.loads(sys.argv[3]).items()
    with torch.inference_mode():
        if name == "labels":
            model.sample([0] * shape[0])
        else:
            model(**{name: torch.ones(shape, dtype=torch.int64 if name == "input_ids" else model.dtype)})
    return model
ready()  # imports, thread pools and look-up tables stay; the model goes
before = resident()
model = ready()
after = resident()
print(json.dumps({"anonymous": after[0] - before[0], "file": max(after[1] - before[1], 0), "process": after[0]}))
"""


def memory(
    path: str | Path,
    dtype: str = "stored",
    probe: Mapping[str, Sequence[int]] = {"input_ids": (1, 1)},  # nothing changes it
    timeout: float = 600.0,
) -> Memory:
    """Loads the model in a fresh process, runs it once, and reads the system's count.

    Args:
        probe: what it is run on: an argument of its forward and its shape, or `labels` for images to draw.

    The process loads it twice and lets the first go, so that what libraries keep for themselves does not count.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _CHILD,
            str(path),
            dtype,
            json.dumps({name: list(shape) for name, shape in probe.items()}),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # tensors go back to the system when they are freed
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ModelError(f"{path} could not be loaded in a fresh process to read its memory: {last[0]}")
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))
