"""The Triton kernels on this machine's GPU, beside torch's own and torchao's, and beside the card's copy bandwidth.

    python benchmarks/gpu.py [--rows 4096 --columns 4096] [--tokens 1 16 512] [--context 32768 --batch 8]
                             [--repeats 25] [--json FILE]
    python benchmarks/gpu.py --check      each product once, ours against float64; nothing is timed

Each contender's calls, one for each of several distinct weights that together exceed the cache, are one CUDA graph, so
that starting kernels costs nobody anything (attention over caches is called as a model calls it). Replays of all
contenders alternate with a copy of a buffer that is larger than the cache; medians with quartiles. GB/s counts the
bytes that a contender reads once: weights with their steps. A contender that is absent, refuses the shape or is wrong
says so in its line.
Exit status 2 where there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gpu_contests import Call, Contest

CACHE = 512 << 20
"""Bytes of weights in turn, several times the cache of any card."""
Row = dict[str, Any]


def prepare(contest: Contest, name: str, copies: int) -> tuple[list[Call], int] | str:
    """The calls of a contender, one a copy, and the bytes each reads; or why it takes no part."""
    calls, size = [], 0
    try:
        for seed in range(copies):
            w = contest.w(seed)
            call, size = contest.contenders[name](w)
            calls.append(call)
            if not seed:
                wanted = contest.wanted(w)
                off = ((call().double() - wanted).norm() / wanted.norm()).item()
                if not off <= contest.tolerance:
                    return f"wrong: off by {off:.3f}, where rounding explains {contest.tolerance}"
    except Exception as error:  # a peer may refuse a shape, a dtype or this GPU in any way it likes
        return f"takes no part: {type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    return calls, size


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def every(calls: list[Call]) -> None:
    for call in calls:
        call()


def milliseconds(run: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def race(contest: Contest, repeats: int) -> list[Row]:
    """Rows of one contest, in the order of its contenders."""
    one = contest.contenders["regauge"](contest.w(0))[1]
    copies = max(2, min(64, -(-CACHE // one)))
    ready, rows = {}, {}
    for name in contest.contenders:
        found = prepare(contest, name, copies)
        if isinstance(found, str):
            rows[name] = {"contest": contest.title, "contender": name, "note": found}
        else:
            calls, size = found
            # the calls are held too: a graph does not keep what its kernels read
            ready[name] = (captured(calls).replay if contest.graph else partial(every, calls), size, calls)
    source = torch.ones(CACHE // 4, device="cuda")
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {name: [] for name in ready}
    probe = []
    for turn in range(repeats + 3):
        taken = {name: milliseconds(run) / copies for name, (run, *_) in ready.items()}
        copied = milliseconds(lambda: target.copy_(source))
        if turn >= 3:
            probe.append(2 * CACHE / copied / 1e6)
            for name, value in taken.items():
                times[name].append(value)
    bandwidth = statistics.median(probe)
    for name, (_, size, _) in ready.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(times[name], n=4))
        speed = size / middle / 1e3
        figures = {"us": middle, "quartiles_us": [low, high], "GB/s": speed, "probe GB/s": bandwidth}
        figures |= {"of probe": speed / bandwidth, "TOPS": contest.operations / middle / 1e6}
        rows[name] = {"contest": contest.title, "contender": name} | figures
    return [rows[name] for name in contest.contenders]


def check(contest: Contest) -> list[Row]:
    """Rows with a note for each contender that is wrong or takes no part."""
    rows: list[Row] = []
    for name in contest.contenders:
        found = prepare(contest, name, 1)
        row: Row = {"contest": contest.title, "contender": name}
        rows.append(row | {"note": found} if isinstance(found, str) else row)
    return rows


def line(row: Row) -> str:
    start = f"{row['contest']:34} {row['contender']:16}"
    if "note" in row:
        return f"{start} {row['note']}"
    if "us" not in row:
        return f"{start} right"
    low, high = row["quartiles_us"]
    return (
        f"{start} {row['us']:9.1f} us [{low:.1f}, {high:.1f}]  {row['GB/s']:7.0f} GB/s = {row['of probe']:.2f} of "
        f"{row['probe GB/s']:.0f}  {row['TOPS']:7.2f} TOPS"
    )


def contests(given: argparse.Namespace, device: torch.device) -> Iterator[Contest]:
    from gpu_contests import linears  # triton is imported here, where there is a device
    from gpu_contests.caches import caches

    for tokens in given.tokens:
        yield from linears(given.rows, given.columns, tokens, device)
    if given.context:
        yield from caches(given.batch, given.context, device)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=4096)
    options.add_argument("--columns", type=int, default=4096)
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    options.add_argument("--context", type=int, default=32768, help="tokens in each cache; 0 for no caches")
    options.add_argument("--batch", type=int, default=8, help="caches, one a sequence")
    options.add_argument("--repeats", type=int, default=25)
    options.add_argument("--check", action="store_true")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    interpreted = given.check and os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        print("there is no CUDA device here, so the GPU kernels were not measured", file=sys.stderr)
        return 2
    device = torch.device("cpu" if interpreted else "cuda")
    print(f"torch {torch.__version__}, {'interpreter' if interpreted else torch.cuda.get_device_name()}", flush=True)
    results, wrong = [], False
    for contest in contests(given, device):
        for row in check(contest) if given.check else race(contest, given.repeats):
            results.append(row)
            wrong |= row["contender"] == "regauge" and "note" in row
            print(line(row), flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
