"""Everything in four bits: presets that round weights, inputs and cache to 4 bits, beside the first of them.

    python benchmarks/four_bits.py                    # the bundled model, its sources to calibrate
    python benchmarks/four_bits.py --model DIR --calibration TEXTS --eval HELD_OUT [--forms plain planted]
    python benchmarks/four_bits.py --presets mine.yaml quarot-w4a4kv4

All are held against the model itself on the second half of the same held-out windows, which reads the cache as decoding
does.
A line a preset and form: KL to the original in nats a token with its 95 % interval over documents, by how much it is
more than that of the first, paired, and seconds of CPU. The planted form is the same function with the outliers of a
large model (`rewrites/planting.py`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from common.heldout import HeldOut

import regauge as rg
from regauge.measure.machine import machine
from regauge.measure.quality import Scores, paired, summarise
from regauge.plan import parse

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("flatquant-w4a4kv4", "quarot-w4a4kv4", "smoothquant-w4a4kv4", "rtn-w4a4kv4")
LENGTH, CALIBRATED = 256, 512
HEAD = "| preset | form | KL | less the first | CPU s |\n|---|---|---|---|---|"


def made(recipe: str, model: Path, held: HeldOut, given: argparse.Namespace) -> tuple[Scores, float]:
    """How far the artifact is from the model itself, and the seconds that making it took."""
    with tempfile.TemporaryDirectory() as scratch:
        out, began = Path(scratch) / "out", time.process_time()
        rg.apply(recipe, model, out, calibration=str(given.calibration), tokens=given.tokens, length=CALIBRATED)
        return held.scores(out), time.process_time() - began


def main() -> int:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    words.add_argument("--presets", nargs="+", default=list(PRESETS), metavar="NAME")
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--calibration", type=Path, default=ROOT / "src")
    words.add_argument("--eval", type=Path, default=ROOT / "tests")
    words.add_argument("--tokens", type=int, default=8192, help="that calibrate")
    words.add_argument("--read", type=int, default=8192, help="held-out tokens, of which half are scored")
    words.add_argument("--forms", nargs="+", default=["plain"], choices=["plain", "planted"])
    given = words.parse_args()
    held = HeldOut(given.model, given.eval, LENGTH, given.read, halved=True)
    print(f"{given.tokens:,} tokens calibrate; {machine().cpu}\n\n{HEAD}")
    with tempfile.TemporaryDirectory() as scratch:
        for form in given.forms:
            model = given.model
            if form == "planted":
                model = Path(scratch) / form
                plan = parse("name: planted\nrewrites: [plant-outliers]\n")
                rg.apply(plan, given.model, model, calibration=str(given.calibration), tokens=given.tokens)
            first: Scores | None = None
            for name in given.presets:
                scores, seconds = made(name, model, held, given)
                kl, gap = summarise(scores).kl, "" if first is None else paired(scores, first, 0).difference
                less = gap and f"{gap.value:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}]"
                told = f"{kl.value:.5f} [{kl.low:.5f}, {kl.high:.5f}]"
                print(f"| {name} | {form} | {told} | {less} | {seconds:.0f} |", flush=True)
                first = scores if first is None else first
    return 0


if __name__ == "__main__":
    sys.exit(main())
