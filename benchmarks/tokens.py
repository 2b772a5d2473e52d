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

import regauge as rg
from regauge.hosts import host_of
from regauge.measure.compare import BATCH
from regauge.measure.quality import compare, paired
from regauge.text.corpora import corpus
from regauge.text.split import pieces
from regauge.text.tokens import frame
from regauge.text.windows import cut

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
    host = host_of(given.model)
    tokenizer = host.tokenizer(host.folder(str(given.model)))
    read = corpus(given.eval)
    windows = cut(pieces(read), tokenizer, LENGTH, description=read.description, before=frame(tokenizer)[0])
    windows = windows.take(READ, 0)
    inputs = [{"input_ids": batch.ids_BT} for batch in windows.batches(BATCH)]
    original = host.outputs(given.model, inputs)
    print(f"{given.model.name}, {windows.predicted:,} held-out tokens of {windows.documents} documents; nats a token")
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
                scores.append(compare(windows, original(), host.outputs(out, inputs)(), BATCH))
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
