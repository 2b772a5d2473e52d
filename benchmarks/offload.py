"""Models larger than memory: `rg.load(memory=)` against accelerate's disk offload, interleaved in one run.

    pip install accelerate==1.15.0              # the peer; without it its row says so
    python benchmarks/offload.py                # 1.1B parameters, some 3 GB under out/bench/models
    python benchmarks/offload.py --quick        # 135M

Rows: a bf16 checkpoint by accelerate (`device_map="auto"`, `max_memory` of the figure, the rest on disk), the same
checkpoint by us with the same figure, and our 4-bit artifact with a smaller one. Each runs in a process of its own,
inside a memory cgroup of the figure and ALLOWANCE for libraries where one can be made, so that the page cache cannot
hold what memory may not; the files are dropped from the cache before every turn. Times come from a streamer under
`generate`, greedy. Bytes are the kernel's count of what came from storage. The disk is probed around every turn by
reading the same files once in order.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.artifacts import artifact, source
from common.shapes import SHAPES, prompt

ALLOWANCE = 700_000_000  # bytes of a process that has loaded the libraries and a small model
PIECE = 8 << 20
PROMPT = 16


def drop(folder: Path) -> None:
    """Lets the files of a model go from the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: Path, limit: int = 1 << 30) -> float:
    """Bytes a second of reading a model's files in order, not from the cache; at most `limit` of them."""
    drop(folder)
    into, done, start = bytearray(PIECE), 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while done < limit and (got := file.readinto(into)):
                os.posix_fadvise(file.fileno(), file.tell() - got, got, os.POSIX_FADV_DONTNEED)
                done += got
    return done / (time.perf_counter() - start)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def fetched() -> int:
    """Bytes that this process had fetched from storage."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


class Clock:
    """A streamer that notes when each token came, and what had been read by then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.read: list[int] = []

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())
        self.read.append(fetched())

    def end(self) -> None:
        """Nothing is held back."""


class Peak:
    """The most anonymous memory, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, status("RssAnon"))
            time.sleep(0.01)


def load(runner: str, path: str, figure: int, scratch: str) -> Any:
    if runner == "regauge":
        import regauge as rg

        return rg.load(path, memory=figure)
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": figure}, offload_folder=scratch
    ).eval()


def work(given: dict[str, Any]) -> None:
    """A worker: loads, then generates once for each line it is sent."""
    import torch

    import regauge as rg

    small = rg.load(given["pico"])  # libraries and thread pools are not the model's
    small.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=4, do_sample=False)
    del small
    before, peak = status("RssAnon"), Peak()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="regauge-offload-") as scratch:
        model = load(given["runner"], given["path"], given["figure"], scratch)
        told = {"load": time.perf_counter() - start, "ids": []}
        ids = torch.tensor([given["prompt"]])
        print(json.dumps(told), flush=True)
        for _ in sys.stdin:
            clock = Clock()
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=given["tokens"], do_sample=False,
                pad_token_id=0, streamer=clock,
            )  # fmt: skip
            at = clock.times  # the prompt comes first, before anything runs
            print(
                json.dumps(
                    {
                        "first": at[1] - at[0],
                        "each": [b - a for a, b in itertools.pairwise(at[1:])],
                        "bytes": (clock.read[-1] - clock.read[1]) / (len(at) - 2),
                        "peak": peak.most - before,
                        "ids": out[0].tolist(),
                    }
                ),
                flush=True,
            )


@dataclass
class Row:
    """One way to run one model."""

    name: str
    runner: str
    path: Path
    figure: int
    load: float = 0.0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    disk: list[float] = field(default_factory=list)
    peak: int = 0
    charged: int | None = None
    ids: list[int] = field(default_factory=list)
    skipped: str = ""


def begin(row: Row, given: dict[str, Any], inside: Path | None) -> subprocess.Popen[str]:
    def enter() -> None:
        if inside is not None:
            (inside / "cgroup.procs").write_text("0")

    asked = {**given, "runner": row.runner, "path": str(row.path), "figure": row.figure}
    return subprocess.Popen(
        [sys.executable, __file__, "--worker", json.dumps(asked)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter,
    )  # fmt: skip


def answer(row: Row, child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a worker; where it has died, the row says why."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if line:
        found: dict[str, Any] = json.loads(line)
        return found
    code, said = child.wait(), child.stderr.read().strip().splitlines() if child.stderr else []
    row.skipped = "killed: it needed more memory than its cgroup has" if code == -9 else (said or ["no message"])[-1]
    return {}


def turns(rows: list[Row], given: dict[str, Any], rounds: int) -> bool:
    """Runs the rows interleaved; whether there were cgroups."""
    with contextlib.ExitStack() as stack:
        children, folders = {}, {}
        for row in rows:
            drop(row.path)
            if row.skipped:
                continue
            folders[row.name] = cgroup(stack, row)
            child = children[row.name] = begin(row, given, folders[row.name])
            stack.callback(child.wait)
            stack.callback(child.kill)
            row.load = answer(row, child).get("load", 0.0)
        for turn in range(1 + rounds):
            for row in (row for row in rows if not row.skipped):
                before = disk_rate(row.path)
                drop(row.path)
                child = children[row.name]
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
                got = answer(row, child)
                rate = (before + disk_rate(row.path)) / 2
                if got and turn:
                    row.first.append(got["first"])
                    row.each += got["each"]
                    row.bytes.append(got["bytes"])
                    row.disk.append(rate)
                    row.fractions.append(got["bytes"] / statistics.median(got["each"]) / rate)
                    row.peak, row.ids = got["peak"], got["ids"]
                    row.charged = charged(folders[row.name])
        return all(folder is not None for folder in folders.values())


def cgroup(stack: contextlib.ExitStack, row: Row) -> Path | None:
    """A memory cgroup for a row, v1 or v2, gone when the stack unwinds; None where none can be made."""
    name = f"regauge-{os.getpid()}-{row.runner}-{row.figure}"
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("memory", ""):
            continue
        top, limit = Path("/sys/fs/cgroup") / controllers, "memory.limit_in_bytes" if controllers else "memory.max"
        for parent in (top / path.lstrip("/"), top):
            folder = parent / name
            try:
                folder.mkdir()
            except OSError:
                continue
            if (folder / limit).exists() and (folder / "cgroup.procs").exists():
                stack.callback(folder.rmdir)
                (folder / limit).write_text(str(row.figure + ALLOWANCE))
                return folder
            folder.rmdir()
    return None


def charged(folder: Path | None) -> int | None:
    """Most bytes that the cgroup counted so far: anonymous memory and pages of files."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if folder is not None and (folder / name).exists():
            return int((folder / name).read_text())
    return None


def table(rows: list[Row]) -> str:
    head = f"{'':28} {'figure GB':>9} {'load s':>7} {'first s':>8} {'tokens/s [quartiles]':>24} {'MB a token':>10} "
    lines = [head + f"{'disk GB/s':>9} {'of it':>6} {'anonymous GB':>12} {'charged GB':>10}"]
    for row in rows:
        if row.skipped:
            lines.append(f"{row.name:28} {row.figure / 1e9:9.2f} skipped: {row.skipped}")
            continue
        low, mid, high = statistics.quantiles([1 / each for each in row.each], n=4)
        most = "" if row.charged is None else f"{row.charged / 1e9:.2f}"
        lines.append(
            f"{row.name:28} {row.figure / 1e9:9.2f} {row.load:7.1f} {statistics.median(row.first):8.2f} "
            f"{f'{mid:.2f} [{low:.2f}, {high:.2f}]':>24} {statistics.median(row.bytes) / 1e6:10.0f} "
            f"{statistics.median(row.disk) / 1e9:9.2f} {statistics.median(row.fractions):6.2f} {row.peak / 1e9:12.2f} "
            f"{most:>10}"
        )
    return "\n".join(lines)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="the 135M shape, bf16 only")
    words.add_argument(
        "--memory", type=float, default=0.55, help="the figure for bf16, as a ratio to the model's bytes"
    )
    words.add_argument("--packed-memory", type=float, default=0.25, help="the same for the 4-bit artifact")
    words.add_argument("--tokens", type=int, default=17)
    words.add_argument("--rounds", type=int, default=3, help="after one that does not count")
    words.add_argument("--out", type=Path, help="where to write the samples as JSON")
    words.add_argument("--worker", help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.worker:
        work(json.loads(given.worker))
        return 0
    shape = SHAPES["smollm-135m" if given.quick else "tinyllama-1.1b"]
    model = source(shape.name)
    size = 2 * (shape.weights() + (0 if shape.tied else shape.vocabulary * shape.hidden))
    figure, packed = int(given.memory * size), int(given.packed_memory * size)
    rows = [
        Row("accelerate bf16", "accelerate", model, figure),
        Row("regauge bf16", "regauge", model, figure),
    ]
    if not given.quick:  # its tables are most of it: nothing would be left to stream
        rows.append(Row("regauge int4 g32", "regauge", artifact(shape.name, "int4 g32"), packed))
    if importlib.util.find_spec("accelerate") is None:
        rows[0].skipped = "not installed: pip install accelerate==1.15.0"
    asked = {"prompt": prompt(shape, PROMPT), "tokens": given.tokens, "pico": str(source("pico"))}
    inside = turns(rows, asked, given.rounds)
    where = f"cgroups of the figure + {ALLOWANCE / 1e9:.1f} GB" if inside else "no memory cgroup could be made"
    print(f"{shape.name}, {size / 1e9:.2f} GB as bf16; prompt of {PROMPT}, {given.tokens} tokens, {where}")
    print(table(rows))
    same = rows[0].skipped or rows[0].ids == rows[1].ids
    print(f"the same tokens by accelerate and by us: {'yes' if same else 'no (bf16 rounding may differ)'}")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps([{**vars(row), "path": row.path.name} for row in rows], indent=1) + "\n")
    return 1 if any(row.skipped for row in rows[1:]) else 0


if __name__ == "__main__":
    sys.exit(main())
