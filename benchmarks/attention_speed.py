"""How fast attention is by its implementations, one layer: step by step (eager), torch's SDPA, FlexAttention, and ours.

    python benchmarks/attention_speed.py                    # decoding and a prompt of 4096 tokens
    python benchmarks/attention_speed.py --flex --tokens 8192   # a window of 256 through FlexAttention, compiled

Milliseconds, the least of several; bfloat16; heads as of a model of 135M parameters (9 heads, 3 KV heads of 64).
FlexAttention is compiled by torch, which on a CPU takes a C++ compiler.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from regauge.attention import forms
from regauge.attention.base import Local
from regauge.hosts.transformers.local import banded
from regauge.kernels.cpu.store import Reading, Store, attend
from regauge.measure.machine import machine

HEADS, KV_HEADS, SIZE = 9, 3, 64


def least(run: Callable[[], Any], times: int) -> float:
    """Milliseconds of the fastest of so many runs, after one that is not counted."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return 1e3 * min(found)


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers' eager functions: the whole matrix of products, a softmax in float32."""
    heads = HEADS // KV_HEADS
    score = query @ key.repeat_interleave(heads, 1).mT * SIZE**-0.5
    if mask is not None:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    return score.float().softmax(-1).to(query.dtype) @ value.repeat_interleave(heads, 1)


def inputs(queries: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, HEADS, queries, SIZE), (1, KV_HEADS, tokens, SIZE), (1, KV_HEADS, tokens, SIZE))
    made = (torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu").bfloat16() for shape in shapes)
    return next(made), next(made), next(made)


def decoding(tokens: int) -> dict[str, float]:
    """One new token over so many."""
    query, key, value = inputs(1, tokens)
    store, reading, asked = Store(key, value), Reading(SIZE**-0.5), query.transpose(1, 2).contiguous()
    return {
        "eager": least(partial(eager, query, key, value, None), 50),
        "SDPA": least(partial(sdpa, query, key, value, enable_gqa=True), 50),
        "ours": least(partial(attend, asked, store, reading, tokens), 50),
    }


def prompt(tokens: int) -> dict[str, float]:
    """All tokens at once."""
    query, key, value = inputs(tokens, tokens)
    mask = forms.dense(forms.causal, 1, 1, tokens, tokens)
    return {
        "eager": least(partial(eager, query, key, value, mask), 2),
        "SDPA": least(partial(sdpa, query, key, value, is_causal=True, enable_gqa=True), 3),
    }


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return sdpa(query, key, value, mask, enable_gqa=True).transpose(1, 2)


def windows(tokens: int, window: int) -> dict[str, float]:
    """A prompt whose tokens see a window: torch's SDPA with the whole mask, and FlexAttention over its blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = inputs(tokens, tokens)
    form = forms.window(window, 4)
    mask = forms.dense(form, 1, 1, tokens, tokens)
    found = {"SDPA, masked": least(partial(sdpa, query, key, value, attn_mask=mask, enable_gqa=True), 3)}
    bands = partial(banded, query, key, value, Local("all", window, 4), _attend)
    found["in bands, as we do"] = least(bands, 3)
    blocks = create_block_mask(form, None, None, tokens, tokens, device="cpu")
    compiled: Any = torch.compile(flex_attention)
    start = time.perf_counter()
    one = compiled(query, key, value, block_mask=blocks, enable_gqa=True)
    found["FlexAttention, the first time"] = 1e3 * (time.perf_counter() - start)
    found["FlexAttention"] = least(partial(compiled, query, key, value, block_mask=blocks, enable_gqa=True), 3)
    found["largest difference of bands"] = float((bands().transpose(1, 2) - one).abs().max())
    found["largest difference"] = float((one - sdpa(query, key, value, mask, enable_gqa=True)).abs().max())
    return found


@torch.no_grad()
def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--flex", action="store_true")
    parser.add_argument("--window", type=int, default=256)
    given = parser.parse_args()
    print(machine())
    ways = {"decode a token": decoding, "a prompt": prompt}
    if given.flex:
        ways = {f"a prompt, a window of {given.window}": partial(windows, window=given.window)}
    for name, run in ways.items():
        found = ", ".join(f"{way} {ms:.3f}" for way, ms in run(given.tokens).items())
        print(f"{name}, {given.tokens} tokens: {found} ms", flush=True)


if __name__ == "__main__":
    main()
