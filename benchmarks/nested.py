"""One file of weights for 2 to 8 bits, beside a file for each: how far from the original, how large, how fast.

    python benchmarks/nested.py                                    # the bundled model
    python benchmarks/nested.py --model DIR --calibration TEXTS --eval HELD_OUT
    python benchmarks/nested.py --skip quality                     # times alone

The rivals are GPTQ at each number of bits by itself, in the same groups, with a step and a value of code 0 of 16 bits
each, as a level has. KL is to the original on windows that nobody calibrated on. Times are of a token and of four
through matrices of 5632 x 2048, as many in turn as no cache holds, one thread, interleaved; seconds of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common.heldout import HeldOut

import regauge as rg
from regauge.engine import apply
from regauge.formats.base import Codes, Format
from regauge.formats.grains import Group
from regauge.formats.planes import Float16Levels, level
from regauge.formats.prefixes import Nested
from regauge.formats.rangers import MinMax
from regauge.kernels.cpu import matrix
from regauge.measure.quality import summarise
from regauge.plan import Plan, load, parse
from regauge.runtime.matrices.held import PackedMatrix

ROOT = Path(__file__).resolve().parent.parent
BITS = range(2, 9)
WITHIN = {2: 1.6} | dict.fromkeys(range(3, 9), 1.25)
"""What a level may have of the KL of the same bits alone."""
GRAIN = "group:128 else group:64 else group:32"
ALONE = """
name: alone-w{bits}
weights:
  blocks.*: {{grid: int{bits}-asym, grain: {grain}, ranger: minmax, scale: f16-low, rounder: gptq}}
"""
SHAPE, SPACE = (5632, 2048), 256 << 20
FMT = Format(Nested(8), Group(128), MinMax(), Float16Levels(5))


def size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def quality(given: argparse.Namespace, scratch: Path) -> None:
    """A row for each number of bits, and the bytes of both files of 8."""
    held = HeldOut(given.model, given.eval, given.length, given.read)

    def made(recipe: Plan, name: str) -> Path:
        apply(
            recipe, given.model, scratch / name, calibration=given.calibration, tokens=given.tokens, length=given.length
        )
        return scratch / name

    nested = made(load(given.recipe), "nested")
    print(f"{'bits':>4} {'nested':>12} {'alone':>12} {'ratio':>6}   KL, nats a token", flush=True)
    for bits in given.bits:
        rg.extract(nested, f"bits={bits}", scratch / "level", force=True)
        alone = made(parse(ALONE.format(bits=bits, grain=GRAIN)), f"alone{bits}")
        one, other = (summarise(held.scores(path), 0).kl for path in (scratch / "level", alone))
        ratio = one.value / other.value
        print(
            f"{bits:4} {one.value:12.3e} {other.value:12.3e} {ratio:6.2f}   at most {WITHIN[bits]}: "
            f"{'yes' if ratio <= WITHIN[bits] else 'no'}",
            flush=True,
        )
    if 8 in given.bits:
        ours, theirs = size(nested), size(scratch / "alone8")
        print(f"file {ours:,} bytes, of 8 bits alone {theirs:,}: {ours / theirs:.3f}", flush=True)


def matrices(codes: Codes, fmt: Format) -> list[PackedMatrix]:
    """As many copies as no cache holds."""
    first = PackedMatrix(codes, fmt, torch.float32)
    assert first.native is not None, "the C++ kernels are not here"
    return [first] + [PackedMatrix(codes, fmt, torch.float32) for _ in range(SPACE // first.native.nbytes)]


def times(rounds: int) -> None:
    """Milliseconds a token through one matrix: levels of one file, and matrices of those bits alone."""
    codes = FMT.encode(
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    )
    whole = matrices(codes, FMT)
    runs: dict[str, list[matrix.Matrix]] = {}
    for bits in BITS:
        runs[f"level {bits}"] = [native for one in whole if (native := one.level(bits).native)]
    for bits in (3, 4, 8):
        runs[f"alone {bits}"] = [native for one in matrices(*level(codes, FMT, bits)) if (native := one.native)]
    for tokens in (1, 4):
        x_TI = torch.randn(
            tokens, SHAPE[1], generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu"
        )
        found = turns(runs, x_TI, rounds)
        print(f"{tokens} token{'s' * (tokens > 1)}")
        for name, each in found.items():
            low, middle, high = statistics.quantiles(each, n=4)
            print(f"  {name}: {middle:.3f} ms ({low:.3f} to {high:.3f})", flush=True)
        middle = {name: statistics.median(each) for name, each in found.items()}
        print(
            f"  level 3 runs {middle['level 8'] / middle['level 3']:.2f} times as fast as level 8, "
            f"{middle['alone 3'] / middle['level 3']:.2f} times as 3 bits alone; level 8 "
            f"{middle['alone 8'] / middle['level 8']:.2f} times as 8 bits alone"
        )


def turns(runs: dict[str, list[matrix.Matrix]], x_TI: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a matrix of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, held in runs.items():
            began = time.process_time()
            for one in held:
                matrix.linear(x_TI, one)
            if turn:
                found[name].append(1e3 * (time.process_time() - began) / len(held))
    return found


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--calibration", type=Path, default=ROOT / "src")
    words.add_argument("--eval", type=Path, default=ROOT / "tests")
    words.add_argument("--recipe", default="nested-w8")
    words.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS)
    words.add_argument("--tokens", type=int, default=32768, help="that calibrate")
    words.add_argument("--length", type=int, default=256, help="of windows")
    words.add_argument("--read", type=int, default=8192, help="held-out tokens")
    words.add_argument("--rounds", type=int, default=15)
    words.add_argument("--skip", choices=("quality", "times"), default="")
    given = words.parse_args()
    torch.set_num_threads(1)
    if given.skip != "times":
        times(given.rounds)
    if given.skip != "quality":
        with TemporaryDirectory() as scratch:
            quality(given, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
