"""Memory and time of `apply` on a model larger than it may hold: GPTQ on 1.1B random parameters, RTN beside it.

    python benchmarks/apply_memory.py                 # writes the model to a temporary directory first
    python benchmarks/apply_memory.py --model DIR --tokens 8192
    python benchmarks/apply_memory.py --recipe autoround-w4g64 --steps 4  # more steps hold no more

GPTQ runs in a child process inside a memory cgroup of 2.5 GB where one can be made (v1 or v2, below our own), so that
it would be killed if it held more; mapped weight files count there only while the kernel has no better use for the
memory. Where none can be made, the child's anonymous resident memory is read every few milliseconds and must stay
below 2 GB. RTN's CPU seconds are those of its process, start-up included, per 100M parameters of the whole model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 2_500_000_000  # bytes of the cgroup
ANONYMOUS = 2_000_000_000  # bytes of anonymous memory where there is no cgroup
CPU = 10.0  # seconds of RTN for 100M parameters
CHILD = """
import json, sys
from dataclasses import replace
from regauge.engine import apply
from regauge.plan import load
recipe, model, out, tokens, length = sys.argv[1:6]
recipe, _, steps = recipe.partition(":")
if steps:
    recipe = load(recipe)
    recipe = replace(recipe, learning={**recipe.learning, "steps": int(steps)})
text = {"calibration": sys.argv[6], "tokens": int(tokens), "length": int(length)} if len(sys.argv) > 6 else {}
receipt = apply(recipe, model, out, **text)
print(json.dumps({"peak": receipt.peak_bytes, "bf16": receipt.bytes_bf16, "ratio": receipt.ratio,
                  "seconds": receipt.seconds}))
"""


@dataclass(frozen=True)
class Ran:
    """One child.

    Attributes:
        wall, cpu: seconds, start-up included.
        peak: anonymous bytes, by its receipt; seen: the same, read from outside.
        charged: most bytes that the cgroup counted, or None.
    """

    wall: float
    cpu: float
    peak: int
    seen: int
    charged: int | None
    parameters: float
    ratio: float


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup below our own, or None where none can be made."""
    made = None
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        for root, file in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
            if (controllers == "memory") != (root.endswith("memory")) or controllers not in ("memory", ""):
                continue
            folder = Path(root + path) / f"regauge-{os.getpid()}"
            try:
                folder.mkdir()
                (folder / file).write_text(str(limit))
                made = folder
            except OSError:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        if made is not None:
            break
    try:
        yield made
    finally:
        if made is not None:
            with contextlib.suppress(OSError):
                made.rmdir()


def charged(folder: Path | None) -> int | None:
    """Most bytes that the cgroup counted so far."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if folder is not None and (folder / name).exists():
            return int((folder / name).read_text())
    return None


def run(recipe: str, model: Path, out: Path, text: list[str], inside: Path | None) -> Ran:
    """`apply` in a process of its own."""

    def enter() -> None:
        if inside is not None:
            (inside / "cgroup.procs").write_text("0")

    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-c", CHILD, recipe, str(model), str(out), *text]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enter)
    seen = [0]

    def watch() -> None:
        while child.poll() is None:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8").splitlines():
                    if line.startswith("RssAnon:"):
                        seen[0] = max(seen[0], int(line.split()[1]) * 1024)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, complaints = child.communicate()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode:
        killed = " (killed: out of memory)" if child.returncode == -9 else ""
        raise SystemExit(f"{recipe} ended with {child.returncode}{killed}\n{complaints[-2000:]}")
    told = json.loads(printed.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    parameters = told["bf16"] / 2
    return Ran(time.monotonic() - began, cpu, told["peak"], seen[0], charged(inside), parameters, told["ratio"])


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--model", type=Path, help="a model directory; without it one is written")
    words.add_argument("--size", default="1.1b", help="of the model that is written")
    words.add_argument("--recipe", default="gptq-w4g128")
    words.add_argument("--steps", type=int, help="of what the recipe learns, of each block; without it as it says")
    words.add_argument("--tokens", type=int, default=8192)
    words.add_argument("--length", type=int, default=512)
    given = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="regauge-memory-") as scratch:
        folder = Path(scratch)
        model = given.model or folder / "model"
        if given.model is None:
            script = HERE.parent / "scripts" / "write_random_model.py"
            subprocess.run([sys.executable, str(script), str(model), "--size", given.size], check=True)
        text = folder / "text"
        text.mkdir()
        for source in sorted(HERE.parent.glob("src/regauge/**/*.py")):
            (text / f"{source.parent.name}-{source.name}.txt").write_text(source.read_text())
        with cgroup(LIMIT) as inside:
            reading = [str(given.tokens), str(given.length), str(text)]
            recipe = f"{given.recipe}:{given.steps}" if given.steps else given.recipe
            gptq = run(recipe, model, folder / "gptq", reading, inside)
        rtn = run("rtn-w4g128", model, folder / "rtn", ["0", "0"], None)
    where = f"inside a memory cgroup of {LIMIT / 1e9:.1f} GB" if inside else "no memory cgroup could be made"
    print(f"{gptq.parameters / 1e6:,.0f}M parameters in bf16, {gptq.parameters * 2 / 1e9:.2f} GB; {where}")
    print(
        f"{given.tokens} calibration tokens in windows of {given.length}; threads: "
        f"{os.environ.get('OMP_NUM_THREADS', 'as torch chooses')}"
    )
    print(
        f"{'recipe':16} {'wall s':>8} {'cpu s':>8} {'cpu s / 100M':>13} {'anonymous GB':>13} {'charged GB':>11} "
        f"{'ratio':>6}"
    )
    for name, ran in ((given.recipe, gptq), ("rtn-w4g128", rtn)):
        most = "" if ran.charged is None else f"{ran.charged / 1e9:.2f}"
        print(
            f"{name:16} {ran.wall:8.1f} {ran.cpu:8.1f} {ran.cpu / ran.parameters * 1e8:13.2f} "
            f"{max(ran.peak, ran.seen) / 1e9:13.2f} {most:>11} {ran.ratio:6.3f}"
        )
    anonymous = max(gptq.peak, gptq.seen)
    fits = inside is not None or anonymous < ANONYMOUS
    quick = rtn.cpu / rtn.parameters * 1e8 < CPU
    print(f"fits: {'yes' if fits else 'NO'} (anonymous memory below 2 GB: {'yes' if anonymous < ANONYMOUS else 'no'})")
    print(f"RTN within {CPU:.0f} CPU seconds for 100M parameters: {'yes' if quick else 'NO'}")
    return 0 if fits and quick else 1


if __name__ == "__main__":
    sys.exit(main())
