"""A whole token of the 135M shape by the length and the bits of its cache, all kinds in turn in one run.

    python benchmarks/decode_cached.py                              # 1k, 4k, 16k; some two minutes
    python benchmarks/decode_cached.py --tokens 32768 --rounds 15

The decode step of SmolLM-135M's shape on random weights of 4 bits (groups of 32) with a cache of random numbers: one
new token, batch 1. Kinds of cache: bf16 throughout; or 8, 4, 2 bits, keys by channel over 32 tokens, values by token,
behind a window of 128 tokens in bf16. Beside each: bytes that a token reads of the cache, how fast it reads them (the
token less one of an empty cache), and the bandwidth probe of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor

from regauge.kernels.attention import Part
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.cpu.layout import Value
from regauge.kernels.cpu.machine import bandwidth
from regauge.kernels.cpu.matrix import pack
from regauge.kernels.cpu.pieces import Block, Norm, Site
from regauge.kernels.cpu.step import Program
from regauge.kernels.cpu.store import Store

BLOCKS, HIDDEN, HEADS, KV_HEADS, SIZE, NEURONS, WORDS = 30, 576, 9, 3, 64, 1536, 49152
WINDOW, TOKENS = 128, 32
KINDS = ("empty", "bf16", "8 bits", "4 bits", "2 bits")


def site(rows: int, columns: int) -> Site:
    """A matrix of 4 bits in groups of 32."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    steps = torch.full((rows, columns // 32), 0.02, dtype=torch.float16)
    return Site(pack(codes, 4, Value(offset=8), 32, steps))


def program() -> Program:
    """The model without its embedding."""
    norms = {name: Norm("rms", HIDDEN, 1e-5, torch.ones(HIDDEN)) for name in ("attn_norm", "mlp_norm")}
    integers = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": SIZE, "rotary": SIZE}
    width, kv = HEADS * SIZE, KV_HEADS * SIZE
    shapes = {"q": (width, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, width)}
    shapes |= {"gate": (NEURONS, HIDDEN), "up": (NEURONS, HIDDEN), "down": (HIDDEN, NEURONS)}
    blocks = [
        Block(norms, {name: site(*shape) for name, shape in shapes.items()}, (), integers, SIZE**-0.5)
        for _ in range(BLOCKS)
    ]
    return Program(blocks, norms["attn_norm"], site(WORDS, HIDDEN), HIDDEN, 1, 0.0)


def window(rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values in bf16 with room for one more."""
    held = torch.randn(1, KV_HEADS, 64, SIZE).repeat(1, 1, rows // 64 + 2, 1)[:, :, : rows + 1]
    return held.to(torch.bfloat16).contiguous(), held.flip(3).to(torch.bfloat16).contiguous()


def store(kind: str, tokens: int) -> tuple[Store, int]:
    """A block's store of so many tokens, and its bytes."""
    if kind in ("empty", "bf16"):
        rows = 1 if kind == "empty" else tokens
        return Store(*window(rows)), rows * KV_HEADS * SIZE * 4
    bits = int(kind[0])
    keys = BlockLayout("keys", TOKENS, SIZE, bits, "time", TOKENS, low=True)
    values = BlockLayout("values", TOKENS, SIZE, bits, "channels", SIZE, low=True)
    count = max(0, tokens - WINDOW) // TOKENS
    memory, offsets = [], []
    for layout in (keys, values):
        codes = torch.randint(0, 1 << bits, (16, TOKENS, SIZE), dtype=torch.uint8)
        steps, lows = torch.rand(16, layout.groups) / (1 << bits) + 0.01, torch.randn(16, layout.groups)
        some = layout.pack(codes, steps, lows)
        memory.append(some.repeat(KV_HEADS * count // 16 + 1, 1)[: KV_HEADS * count].flatten().contiguous())
        offsets.append(torch.arange(KV_HEADS, dtype=torch.int64)[None] * (count * layout.bytes))
    part = Part(keys, values, *memory, *offsets, torch.full((1, KV_HEADS), count * TOKENS, dtype=torch.int32))
    held = tokens - count * TOKENS
    size = sum(one.numel() for one in memory) + held * KV_HEADS * SIZE * 4
    return Store(*window(held), origin=count * TOKENS, parts=(part,)), size


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    words.add_argument("--rounds", type=int, default=15)
    given = words.parse_args()
    torch.manual_seed(0)
    step, x = program(), torch.randn(1, HIDDEN)
    half = SIZE // 2
    for tokens in given.tokens:
        tables = [(torch.ones(tokens + 1, half), torch.zeros(tokens + 1, half))]
        kept = {kind: [store(kind, tokens) for _ in range(BLOCKS)] for kind in KINDS}
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        probes = []
        for _ in range(given.rounds + 1):
            for kind in KINDS:
                step.keep([one for one, _ in kept[kind]])
                lengths = [1 if kind == "empty" else tokens] * BLOCKS
                step(x, lengths[:1], [0], tables, lengths)
                start = time.perf_counter()
                step(x, lengths[:1], [0], tables, lengths)
                taken[kind].append(1e3 * (time.perf_counter() - start))
            probes.append(bandwidth(torch.get_num_threads()))
        report(tokens, kept, {kind: times[1:] for kind, times in taken.items()}, probes)
    return 0


def report(
    tokens: int, kept: dict[str, list[tuple[Store, int]]], taken: dict[str, list[float]], probes: list[float]
) -> None:
    """One table: medians, and the quarters on both sides of them."""
    probe, empty = statistics.median(probes), statistics.median(taken["empty"])
    print(f"\n{tokens} tokens; the probe reads {probe / 1e9:.1f} GB/s, an empty cache takes {empty:.2f} ms")
    print(f"{'cache':8} {'ms':>8} {'quarters':>15} {'MB':>8} {'GB/s':>6} {'of probe':>8} {'bf16 / it':>9}")
    for kind in KINDS[1:]:
        low, middle, high = statistics.quantiles(taken[kind], n=4)
        size = sum(one for _, one in kept[kind])
        rate = size / (1e-3 * max(middle - empty, 1e-3))
        gain = statistics.median(whole / own for whole, own in zip(taken["bf16"], taken[kind], strict=True))
        print(
            f"{kind:8} {middle:8.2f} {low:7.2f} {high:7.2f} {size / 1e6:8.1f} {rate / 1e9:6.1f} "
            f"{rate / probe:8.2f} {gain:9.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
