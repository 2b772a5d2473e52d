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
import json
import statistics
import sys
import time
from collections.abc import Sequence
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
from regauge.plan import Plan, digest, load, parse
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
    """A row for each number of bits, and the bytes of both files of 8. Every figure is kept once it is there."""
    asked = {name: str(getattr(given, name)) for name in ("model", "calibration", "eval", "tokens", "length", "read")}
    kept = json.loads(given.keep.read_text()) if given.keep.exists() else {}
    kept = kept if kept.get("asked") == asked else {"asked": asked, "found": {}}
    found: dict[str, list[float]] = kept["found"]
    rows = {name: digest(load(name)) for name in given.recipes}
    rows |= {f"alone {bits}": digest(parse(ALONE.format(bits=bits, grain=GRAIN))) for bits in given.bits}
    held = None

    def measured(name: str, plan: Plan, levels: Sequence[int]) -> dict[int, float]:
        """Bits → KL of a file at its levels."""
        nonlocal held
        keys = {bits: f"{name} {rows[name]} at {bits}" for bits in levels}
        if any(key not in found for key in keys.values()):
            held = held or HeldOut(given.model, given.eval, given.length, given.read)
            amounts = {"tokens": given.tokens, "length": given.length}
            out = scratch / "made"
            apply(plan, given.model, out, calibration=given.calibration, force=True, **amounts)
            for bits, key in keys.items():
                path = out
                if len(levels) > 1:
                    path = scratch / "level"
                    rg.extract(out, f"bits={bits}", path, force=True)
                found[key] = [summarise(held.scores(path), 0).kl.value, size(out)]
                given.keep.parent.mkdir(parents=True, exist_ok=True)
                given.keep.write_text(json.dumps(kept))
        return {bits: found[key][0] for bits, key in keys.items()}

    def bytes_of(name: str, bits: int) -> float:
        return found[f"{name} {rows[name]} at {bits}"][1]

    print("KL to the original, nats a token; in parentheses over that of the same bits alone", flush=True)
    print(f"{'bits':>10}{'alone':>12}{''.join(f'{name:>22}' for name in given.recipes)}   at most", flush=True)
    alone = {}
    for bits in given.bits:
        name = f"alone {bits}"
        alone |= measured(name, parse(ALONE.format(bits=bits, grain=GRAIN)), (bits,))
    nested = {name: measured(name, load(name), given.bits) for name in given.recipes}
    for bits in given.bits:
        cells = "".join(f"{one[bits]:>14.3e} ({one[bits] / alone[bits]:.2f})" for one in nested.values())
        print(f"{bits:>10}{alone[bits]:>12.3e}{cells}   {WITHIN[bits]}", flush=True)
    if 8 in given.bits:
        whole = bytes_of("alone 8", 8)
        cells = "".join(f"{bytes_of(name, 8) / whole:>22.3f}" for name in nested)
        print(f"{'bytes':>10}{whole:>12,.0f}{cells}   1.05", flush=True)


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
    words.add_argument("--recipes", nargs="+", default=["nested-w8"], help="presets of weights with levels")
    words.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS)
    words.add_argument("--tokens", type=int, default=8192, help="that calibrate")
    words.add_argument("--length", type=int, default=256, help="of windows")
    words.add_argument("--read", type=int, default=4096, help="held-out tokens")
    words.add_argument(
        "--keep",
        type=Path,
        default=ROOT / "out" / "nested.json",
        help="figures, kept and gone on with by the same recipes; delete it where code has changed",
    )
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
