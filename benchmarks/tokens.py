"""As many calibration tokens as it takes against the long calibration: KL to the original, paired, and CPU seconds.

    python benchmarks/tokens.py                              # the bundled model on the sources of this project
    python benchmarks/tokens.py --model DIR --calibration TEXTS --eval HELD_OUT

Each preset is applied twice to one model: as the command does by itself, and with the whole length that its recipe
names. Both are held against the original on the same held-out windows; the difference has its interval over documents.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from common.heldout import HeldOut

import regauge as rg
from regauge.measure.quality import paired

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("gptq-w2g64", "gptq-w3g64", "gptq-w4g128")
LONG, LENGTH, READ = 262144, 256, 61440  # tokens: of the long calibration, of a window, of the held-out text


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--calibration", type=Path, default=ROOT / "src")
    words.add_argument("--eval", type=Path, default=ROOT / "tests")
    words.add_argument("--presets", nargs="+", default=PRESETS)
    given = words.parse_args()
    held = HeldOut(given.model, given.eval, LENGTH, READ)
    print(f"{'preset':14} {'tokens':>8} {'KL':>9} {'cpu s':>7} {'long':>8} {'KL':>9} {'cpu s':>7}  ratio  difference")
    for preset in given.presets:
        scores, spent, counts = [], [], []
        with tempfile.TemporaryDirectory() as scratch:
            for tokens in (None, LONG):
                began = time.process_time()
                out = Path(scratch) / str(tokens)
                receipt = rg.apply(preset, given.model, out, calibration=str(given.calibration), tokens=tokens)
                spent.append(time.process_time() - began)
                shape: list[int] = receipt.calibration["shape"]  # type: ignore[assignment]  # of text
                counts.append(shape[0] * shape[1])
                scores.append(held.scores(out))
        enough, long = (float(score.kl_N.mean()) for score in scores)
        gap = paired(scores[0], scores[1], 0).difference
        print(
            f"{preset:14} {counts[0]:8,} {enough:9.5f} {spent[0]:7.1f} {counts[1]:8,} {long:9.5f} {spent[1]:7.1f}  "
            f"{enough / long:5.3f}  {gap.value:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}]",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
