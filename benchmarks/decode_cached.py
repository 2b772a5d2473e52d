"""A whole token by the length and the bits of its cache, all kinds in turn in one run.

    python benchmarks/decode_cached.py                              # 1k, 4k, 16k; some two minutes
    python benchmarks/decode_cached.py --tokens 32768 --rounds 15
    python benchmarks/decode_cached.py --shape tinyllama-1.1b --tokens 16384

The decode step of a shape of `common/shapes.py` on random weights of 4 bits (groups of 32) with a cache of random
numbers: one new token, batch 1. Kinds of cache: bf16 throughout; or 8, 4, 2 bits, keys by channel over 32 tokens,
values by token, behind a window of 128 tokens in bf16. Beside each: bytes that a token reads of the cache, how fast it
reads them (the token less one of an empty cache), and the bandwidth probe of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from common.shapes import SHAPES, Shape
from torch import Tensor

from regauge.kernels.attention import Part
from regauge.kernels.blocks import BlockLayout
from regauge.kernels.cpu.layout import Value
from regauge.kernels.cpu.machine import bandwidth
from regauge.kernels.cpu.matrix import pack
from regauge.kernels.cpu.pieces import Block, Norm, Site
from regauge.kernels.cpu.step import Program
from regauge.kernels.cpu.store import Store
from regauge.runtime.matrices.arena import Arena

WINDOW, TOKENS = 128, 32
KINDS = ("empty", "bf16", "8 bits", "4 bits", "2 bits")


def site(rows: int, columns: int, activations: str, arena: Arena) -> Site:
    """A matrix of 4 bits in groups of 32, in memory as a loaded model's is: huge pages are read a third faster."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    steps = torch.full((rows, columns // 32), 0.4 * columns**-0.5, dtype=torch.float16)
    return Site(pack(codes, 4, Value(offset=8), 32, steps, allocate=arena.allocate), activations=activations)


def program(shape: Shape, activations: str = "int16") -> Program:
    """The model without its embedding."""
    blocks, norm, head = pieces(shape, activations)
    return Program(blocks, norm, head, shape.hidden, 1, 0.0)


def pieces(shape: Shape, activations: str) -> tuple[list[Block], Norm, Site]:
    """Its blocks, its last norm, its head."""
    hidden, size = shape.hidden, shape.head
    norms = {name: Norm("rms", hidden, 1e-5, torch.ones(hidden)) for name in ("attn_norm", "mlp_norm")}
    integers = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": size, "rotary": size}
    matrices, arena = shape.matrices(), Arena()
    blocks = [
        Block(
            norms, {name: site(*rows, activations, arena) for name, rows in matrices.items()}, (), integers, size**-0.5
        )
        for _ in range(shape.layers)
    ]
    return blocks, norms["attn_norm"], site(shape.vocabulary, hidden, activations, arena)


def window(shape: Shape, rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values in bf16 with room for one more."""
    held = torch.randn(1, shape.kv_heads, 64, shape.head).repeat(1, 1, rows // 64 + 2, 1)[:, :, : rows + 1]
    return held.to(torch.bfloat16).contiguous(), held.flip(3).to(torch.bfloat16).contiguous()


def store(shape: Shape, kind: str, tokens: int) -> tuple[Store, int]:
    """A block's store of so many tokens, and its bytes."""
    kv_heads, size = shape.kv_heads, shape.head
    if kind in ("empty", "bf16"):
        rows = 1 if kind == "empty" else tokens
        return Store(*window(shape, rows)), rows * kv_heads * size * 4
    bits = int(kind[0])
    keys = BlockLayout("keys", TOKENS, size, bits, "time", TOKENS, low=True)
    values = BlockLayout("values", TOKENS, size, bits, "channels", size, low=True)
    count = max(0, tokens - WINDOW) // TOKENS
    memory, offsets = [], []
    for layout in (keys, values):
        codes = torch.randint(0, 1 << bits, (16, TOKENS, size), dtype=torch.uint8)
        steps, lows = torch.rand(16, layout.groups) / (1 << bits) + 0.01, torch.randn(16, layout.groups)
        some = layout.pack(codes, steps, lows)
        memory.append(some.repeat(kv_heads * count // 16 + 1, 1)[: kv_heads * count].flatten().contiguous())
        offsets.append(torch.arange(kv_heads, dtype=torch.int64)[None] * (count * layout.bytes))
    part = Part(keys, values, *memory, *offsets, torch.full((1, kv_heads), count * TOKENS, dtype=torch.int32))
    held = tokens - count * TOKENS
    read = sum(one.numel() for one in memory) + held * kv_heads * size * 4
    return Store(*window(shape, held), origin=count * TOKENS, parts=(part,)), read


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    words.add_argument("--rounds", type=int, default=15)
    words.add_argument("--shape", choices=tuple(SHAPES), default="smollm-135m")
    given = words.parse_args()
    torch.manual_seed(0)
    shape = SHAPES[given.shape]
    step, x, half = program(shape), torch.randn(1, shape.hidden), shape.head // 2
    for tokens in given.tokens:
        tables = [(torch.ones(tokens + 1, half), torch.zeros(tokens + 1, half))]
        kept = {kind: [store(shape, kind, tokens) for _ in range(shape.layers)] for kind in KINDS}
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        probes = []
        for _ in range(given.rounds + 1):
            for kind in KINDS:
                step.keep([one for one, _ in kept[kind]])
                lengths = [1 if kind == "empty" else tokens] * shape.layers
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
