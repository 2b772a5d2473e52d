"""What learning is worth: weights whose ranges were trained by the block's error, against their nulls.

    python benchmarks/learnt.py [--bits 2,3] [--group 64] [--tokens 32768] [--steps 320] [--rate 0.01] [MODEL]

Each row is one recipe on one model at the same bytes: the range is the group's own (`minmax`), searched by the squared
error of the weights (`search`), or learnt (`learnt-clip`, OmniQuant's); rounded to nearest and by GPTQ. Calibration is
one collection of novels, and KL to the original is taken on others, with 95% intervals over documents; the last
column compares with the null of the same rounder (`minmax`), documents drawn for both at once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import regauge
from regauge.measure.quality import Scores, compare, paired, summarise
from regauge.plan import Plan, parse
from regauge.text.corpora import corpus
from regauge.text.windows import Windows, cut, stretches

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
ROWS = [(ranger, rounder) for rounder in ("nearest", "gptq") for ranger in ("minmax", "search", "learnt-clip")]


def recipe(bits: int, group: int, ranger: str, rounder: str, given: argparse.Namespace) -> Plan:
    learnt = ranger == "learnt-clip"
    how = f"learning: {{steps: {given.steps}, batch: {given.batch}}}\n" if learnt else ""
    ranger = f"'learnt-clip:{given.rate}'" if learnt else ranger
    point = f"grid: int{bits}-asym, grain: group:{group} else channel, ranger: {ranger}, rounder: {rounder}"
    return parse(f"name: w{bits}g{group}\n{how}weights:\n  blocks.*: {{{point}}}\n")


@torch.no_grad()
def logits(model: object, windows: Windows) -> Iterator[Tensor]:
    assert callable(model)
    for batch in windows.batches(2048):
        yield model(batch.ids_BT)["logits"].float()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=SHARED / "models" / "novel-llama-8m")
    parser.add_argument("--calibration", type=Path, default=SHARED / "data" / "novels")
    parser.add_argument("--eval", type=Path, default=SHARED / "data" / "novels-heldout")
    parser.add_argument("--bits", default="2,3")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--held", type=int, default=16384, help="tokens of the evaluation text")
    parser.add_argument("--rows", default="", help="only those whose name holds one of these words, by commas")
    given = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    held = [piece for text in corpus(str(given.eval)).texts() for piece in stretches(text, 4000)]
    few = held[:: max(1, len(held) * 1000 // given.held)]  # of some thousand tokens each, from every novel
    windows = cut(few, tokenizer, given.length)
    original = regauge.load(given.model, dtype=torch.float32)
    read = f"{windows.predicted:,} evaluation tokens in {windows.documents} stretches"
    print(f"{given.model.name}: {given.tokens:,} calibration tokens, {read}")
    print(f"{'recipe':<30}{'bytes':>11}{'seconds':>9}{'KL':>10}   95% interval        against its null")
    words = [word for word in given.rows.split(",") if word]
    for bits in map(int, given.bits.split(",")):
        nulls: dict[str, Scores] = {}
        for ranger, rounder in ROWS:
            name = f"w{bits}g{given.group} {ranger} {rounder}"
            if words and not any(word in name for word in words):
                continue
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                receipt = regauge.apply(
                    recipe(bits, given.group, ranger, rounder, given),
                    given.model,
                    Path(folder) / "out",
                    calibration=str(given.calibration),
                    tokens=given.tokens,
                    length=given.length,
                )
                seconds = time.monotonic() - began
                made = regauge.load(Path(folder) / "out", dtype=torch.float32)
                scores = compare(windows, logits(original, windows), logits(made, windows), 2048)
                shutil.rmtree(Path(folder) / "out")
            null = nulls.setdefault(rounder, scores)
            kl, gap = summarise(scores).kl, paired(scores, null).difference
            print(
                f"{name:<30}{receipt.bytes_after:>11,}{seconds:>9.1f}{kl.value:>10.5f}   [{kl.low:.5f}, {kl.high:.5f}]"
                f"  {gap.value:+.5f} [{gap.low:+.5f}, {gap.high:+.5f}]",
                flush=True,
            )
            for entry in receipt.learnt:
                print(f"    block {entry['block']}: {entry['before']:.5f} → {entry['after']:.5f} in {entry['steps']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
