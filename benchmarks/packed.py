"""Which way of multiplying a packed matrix is fast here: each format against bf16 `F.linear`, pairs interleaved.

    python benchmarks/packed.py [--rows 2048 --columns 2048] [--tokens 1 16 512] [--repeats 15]

Shapes default to TinyLlama's (1.1B). Weights are unique and together larger than the cache, so that decoding reads
memory. Prints medians with their quartiles, GB/s of the bytes held, the ratio to bf16, and a bandwidth probe beside
each row, because two-thread bandwidth of such hosts changes from minute to minute. On a busy machine use `--threads 1`:
the clock is then that of the thread, which does not count the time of others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from regauge import parts
from regauge.hosts.transformers.packed.modules import PackedMatrix
from regauge.parts import Choice

FORMS = {
    "int8 channel": ("int8", "channel", "bf16", None),
    "int8 x int8": ("int8", "channel", "f32", "int8"),
    "int4 g128": ("int4", "group:128", "bf16", None),
    "int4-asym g128": ("int4-asym", "group:128", "bf16", None),
    "int4 g32": ("int4", "group:32", "bf16", None),
    "int3 g128": ("int3", "group:128", "bf16", None),
    "int2 g64": ("int2", "group:64", "bf16", None),
    "int6 g128": ("int6", "group:128", "bf16", None),
    "nf4 g64": ("nf4", "group:64", "bf16", None),
    "nvfp4": ("fp4", "group:16", "nv", None),
    "mxfp4": ("fp4", "group:32", "e8m0", None),
    "fp8 channel": ("fp8", "channel", "f32", None),
    "fp8 x fp8": ("fp8", "channel", "f32", "fp8"),
}
CACHE = 96 << 20  # bytes of weights in turn


def choice(grid: str, grain: str, scale: str, inputs: str | None) -> Choice:
    return Choice(
        parts.read("grid", grid),
        parts.read("grain", grain),
        parts.read("ranger", "minmax" if grid.endswith("asym") else "absmax"),
        parts.read("scale", scale),
        parts.read("rounder", "nearest"),
        None,
        None if inputs is None else parts.read("grid", inputs),
    )


def timed(run: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def bandwidth(buffer: torch.Tensor) -> float:
    """GB/s of reading a buffer larger than the cache once."""
    return buffer.numel() * buffer.element_size() / timed(lambda: buffer.sum()) / 1e9


def spread(seconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle * 1e3:8.3f} ms [{low * 1e3:.3f}, {high * 1e3:.3f}]"


def compare(name: str, rows: int, columns: int, tokens: int, repeats: int, buffer: torch.Tensor) -> str:
    how = choice(*FORMS[name])
    fmt = parts.format_of(how)
    inputs = None if how.activations is None else parts.build("grid", how.activations)
    copies = max(2, min(24, CACHE // (rows * columns))) if tokens < 64 else 2
    weights = [torch.randn(rows, columns) * columns**-0.5 for _ in range(copies)]
    packed = [PackedMatrix(fmt.encode(w), fmt, torch.bfloat16, "cpu", inputs) for w in weights]
    full = [w.bfloat16() for w in weights]
    x = torch.randn(tokens, columns).bfloat16()
    held = sum(b.numel() * b.element_size() for b in packed[0].buffers())
    ours, theirs, probe = [], [], []
    with torch.inference_mode():
        for turn in range(repeats + 2):
            a = timed(lambda turn=turn: packed[turn % copies](x))  # type: ignore[misc]  # a default argument binds it
            b = timed(lambda turn=turn: torch.nn.functional.linear(x, full[turn % copies]))  # type: ignore[misc]  # the same
            if turn >= 2:
                ours.append(a)
                theirs.append(b)
                probe.append(bandwidth(buffer))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    speed = held / statistics.median(ours) / 1e9
    return (
        f"{name:15} {packed[0].way.name[:8]:8} {8 * held / rows / columns:5.2f} bits  {spread(ours)}"
        f"  bf16 {spread(theirs)}"
        f"  {ratio:5.2f}x  {speed:5.1f} GB/s (probe {statistics.median(probe):.0f})"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=2048)
    options.add_argument("--columns", type=int, default=2048)
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--only", nargs="+", default=list(FORMS))
    given = options.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    buffer = torch.ones(64 << 20)
    print(f"{given.rows} x {given.columns}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for tokens in given.tokens:
        print(f"-- {tokens} tokens")
        for name in given.only:
            print(compare(name, given.rows, given.columns, tokens, given.repeats, buffer), flush=True)


if __name__ == "__main__":
    main()
