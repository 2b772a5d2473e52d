"""Time, memory and disk of the commands at the sizes that people use: random weights of real shapes, real text.

    python benchmarks/scale.py                                  # gptq-w4g128 and rtn-w4g128 on 135M and 1.1B
    python benchmarks/scale.py --sizes 8b-4 --recipes gptq-w4g128
    python benchmarks/scale.py --sizes 1.1b --tokens 32768
    python benchmarks/scale.py --sizes 1.1b --recipes fit       # a whole search, to memory=0.3x
    python benchmarks/scale.py --sizes 1.1b --peers             # and llama.cpp, llm-compressor, auto-round beside

`8b-4` has the shape of an 8B llama and the first four of its 32 blocks; a line below it counts the time of the blocks
eight times and the rest once. Each command runs in a process of its own; anonymous memory and bytes on disk are read
from outside while it runs. The floor counts what must be computed, of the tokens that the receipt says were read: two
passes of the blocks, half of XᵀX of each input, and error feedback (O·I² + I³/3 of each site), at the rate of this
machine's own bf16 product (feedback: float32), measured before and after. Figures of quality are not taken here.

With `--peers` (installed by `python benchmarks/peers/setup.py`) each peer gets the model, the text, and as many windows
as long as those of the last recipe that calibrates. llama.cpp's time is that of llama-imatrix and llama-quantize,
without writing the GGUF file. auto-round is timed on the first `--few` blocks and counted for all; `--few 0` runs all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import calibrating
from common.probe import best
from common.watched import watched

ROOT = Path(__file__).resolve().parent.parent
WHOLE = {"8b-4": 8}  # size → how often its blocks are in the whole model
CHILD = """
import json, sys, time
import regauge as rg
recipe, model, out, text, tokens = sys.argv[1:6]
reads = {"calibration": text} if text else {}
reads |= {"tokens": int(tokens)} if text and int(tokens) else {}
began, spent, last = time.monotonic(), {}, ["start", time.monotonic()]

def watch(event):
    now = time.monotonic()
    spent[last[0]] = spent.get(last[0], 0.0) + now - last[1]
    last[:] = [event.phase, now]

if recipe == "fit":
    reads.pop("tokens", None)
    rg.fit(model, out, "memory=0.3x", progress=watch, **reads)
    print(json.dumps({"shape": None, "phases": spent}))
else:
    receipt = rg.apply(recipe, model, out, progress=watch, **reads)
    print(json.dumps({"shape": receipt.calibration.get("shape"), "phases": spent}))
"""


@dataclass(frozen=True)
class Shape:
    """What the floor counts, of one block: the sites (O, I), and widths of the inputs that are summed."""

    sites: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    blocks: int

    @staticmethod
    def of(config: dict[str, int]) -> Shape:
        d, f = config["hidden_size"], config["intermediate_size"]
        kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
        return Shape(
            ((d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)), (d, d, d, f), config["num_hidden_layers"]
        )

    def floor(self, tokens: int, narrow: float, wide: float) -> dict[str, float]:
        """Seconds of each part at so many operations a second in bf16 (`narrow`) and float32."""
        weights = self.blocks * sum(o * i for o, i in self.sites)
        return {
            "passes": 2 * 2.0 * tokens * weights / narrow,
            "XtX": self.blocks * sum(1.0 * tokens * i * i for i in self.inputs) / narrow,
            "feedback": self.blocks * sum(2.0 * o * i * i + 2 / 3 * i**3 for o, i in self.sites) / wide,
        }


@dataclass(frozen=True)
class Ran:
    """One command: seconds, CPU seconds, most anonymous bytes and bytes on disk, tokens, seconds by phase, window."""

    wall: float
    cpu: float
    peak: int
    disk: int
    tokens: int
    phases: dict[str, float]
    length: int


def rates(edge: int = 2048) -> tuple[float, float]:
    """Operations a second of a square product in bf16 and float32."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(edge, edge).to(dtype)
        found.append(2.0 * edge**3 / best(lambda a=a: torch.mm(a, a), 1.0))
    return found[0], found[1]


def run(recipe: str, model: Path, out: Path, text: str, tokens: int) -> Ran:
    """`apply` in a process of its own, watched."""
    folders = (out, out.with_name(out.name + ".partial"), out.with_name(out.name + ".search"))
    found = watched([sys.executable, "-c", CHILD, recipe, str(model), str(out), text, str(tokens)], folders)
    if found.code:
        raise SystemExit(f"{recipe} ended with {found.code}\n{found.complaints[-2000:]}")
    told = json.loads(found.printed.splitlines()[-1])
    count, length = told["shape"] or (0, 0)
    return Ran(found.wall, found.cpu, found.peak, found.disk, count * length, told["phases"], length)


def peers(model: Path, text: Path, ours: tuple[str, Ran], few: int, patience: float) -> None:
    """The rows of the peers, as many tokens each as one of ours read."""
    recipe, ran = ours
    for name in calibrating.KNOWN:
        out = model.with_name(f"{model.name}-{calibrating.KNOWN[name].script}")
        first = rates()
        told = calibrating.run(name, model, out, text, (ran.tokens // ran.length, ran.length, few), patience * ran.wall)
        if isinstance(told, str):
            print(f"{model.name.removeprefix('model-'):8} {name:20} {told}", flush=True)
            continue
        narrow, wide = ((a + b) / 2 for a, b in zip(first, rates(), strict=True))
        print(
            f"{model.name.removeprefix('model-'):8} {name:20} {told.tokens:8} {told.seconds:8.1f} {told.ran.cpu:8.1f} "
            f"{'':8} {'':7} {told.ran.peak / 1e9:8.2f} {told.ran.disk / 1e9:8.2f}"
        )
        share = told.ran.cpu * told.seconds / told.ran.wall  # of the same phases and blocks as the seconds
        times = f"{told.seconds / ran.wall:.2f} times the seconds and {share / ran.cpu:.2f} times the CPU seconds"
        print(f"  {times} of {recipe}")
        print(f"  machine: bf16 {narrow / 1e9:.0f}, float32 {wide / 1e9:.0f} GFLOP/s")
        print(f"  {told.note}", flush=True)
        shutil.rmtree(out, ignore_errors=True)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--sizes", nargs="+", default=["135m", "1.1b"])
    words.add_argument("--recipes", nargs="+", default=["rtn-w4g128", "gptq-w4g128"])
    words.add_argument("--tokens", type=int, help="calibration tokens; as the command itself chooses where not given")
    words.add_argument("--text", type=Path, help="calibration text; else the sources of this project")
    words.add_argument("--peers", action="store_true", help="the peers too, on as many tokens")
    words.add_argument("--few", type=int, default=2, help="blocks that auto-round is timed on; 0: all")
    words.add_argument("--patience", type=float, default=4.0, help="times our seconds, after which a peer is stopped")
    words.add_argument("--scratch", type=Path, help="where models and artifacts lie; a temporary directory otherwise")
    given = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="regauge-scale-", dir=given.scratch) as scratch:
        folder = Path(scratch)
        text = given.text or folder / "text"
        if given.text is None:
            text.mkdir()
            for source in sorted(ROOT.glob("src/regauge/**/*.py")):
                (text / f"{source.parent.name}-{source.name}.txt").write_text(
                    source.read_text(encoding="utf-8"), encoding="utf-8"
                )
        print(f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs")
        heads = ("tokens", "wall s", "cpu s", "floor s", "ratio", "anon GB", "disk GB")
        widths = (8, 8, 8, 8, 7, 8, 8)
        titles = " ".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
        print(f"{'size':8} {'recipe':20} {titles}")
        for size in given.sizes:
            model = folder / f"model-{size}"
            script = ROOT / "scripts" / "write_random_model.py"
            subprocess.run(
                [sys.executable, str(script), str(model), "--size", size], check=True, stdout=subprocess.DEVNULL
            )
            shape = Shape.of(json.loads((model / "config.json").read_text(encoding="utf-8")))
            calibrated = None
            for recipe in given.recipes:
                out = folder / f"out-{size}-{recipe}"
                first = rates()
                ran = run(recipe, model, out, "" if recipe.startswith("rtn") else str(text), given.tokens or 0)
                calibrated = (recipe, ran) if ran.tokens else calibrated
                narrow, wide = ((a + b) / 2 for a, b in zip(first, rates(), strict=True))
                floor = shape.floor(ran.tokens, narrow, wide) if ran.tokens else {}
                least = sum(floor.values())
                over = f"{ran.wall / least:7.2f}" if least else f"{'':>7}"
                print(
                    f"{size:8} {recipe:20} {ran.tokens:8} {ran.wall:8.1f} {ran.cpu:8.1f} {least:8.1f} {over} "
                    f"{ran.peak / 1e9:8.2f} {ran.disk / 1e9:8.2f}"
                )
                parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in floor.items())
                print(f"  machine: bf16 {narrow / 1e9:.0f}, float32 {wide / 1e9:.0f} GFLOP/s; floor: {parts or 'none'}")
                print(
                    "  phases: " + ", ".join(f"{name} {value:.1f} s" for name, value in ran.phases.items()), flush=True
                )
                if size in WHOLE:
                    whole = ran.wall + (WHOLE[size] - 1) * ran.phases.get("blocks", 0.0)
                    print(f"  with the blocks {WHOLE[size]} times: {whole / 60:.1f} minutes")
            if given.peers and calibrated is None:
                print(
                    f"{size:8} no peers: none of the recipes calibrates, so there is no number of tokens to give them"
                )
            elif given.peers and calibrated is not None:
                peers(model, text, calibrated, given.few, given.patience)
    return 0


if __name__ == "__main__":
    sys.exit(main())
