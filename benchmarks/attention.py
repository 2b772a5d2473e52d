"""Forms of attention on a trained model, each beside its null: KL from the original on held-out text, and bytes.

    python benchmarks/attention.py MODEL --calibration FOLDER --eval FOLDER

A line a recipe: megabytes of the artifact, bytes of a token in the cache (bf16), the mean KL of a token's distribution
from the original's over windows of 512 tokens, and its standard error over windows. Nulls are drawn by lot, twice.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from common.heldout import divergence, log_probabilities, windows

import regauge as rg
from regauge.engine import apply
from regauge.errors import FallbackWarning
from regauge.plan import Plan, load
from regauge.plan.text import parse

LENGTH = 512


def recipes() -> Iterator[tuple[str, Plan]]:
    """Each row, and twice what it is held to."""
    for percent in (23, 41):
        yield f"echoatt-{percent}", load(f"echoatt-{percent}")
        for seed in (0, 1):
            part = {"part": "lot", "amount": percent / 100, "seed": seed}
            yield f"{percent} % by lot, seed {seed}", parse({"attention": {"blocks.*": {"share": part}}})
    for tokens in (64, 128):
        yield f"ls-attention-w{tokens}", load(f"ls-attention-w{tokens}")
        for seed in (0, 1):
            part = {"part": "by-lot", "short": 0.5, "tokens": tokens, "sinks": 1, "seed": seed}
            yield f"half see {tokens}, by lot, seed {seed}", parse({"attention": {"blocks.*": {"window": part}}})
    yield "windowed-128", load("windowed-128")


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    given = parser.parse_args()
    from transformers import AutoTokenizer

    texts = windows(AutoTokenizer.from_pretrained(given.model), given.eval, given.windows, LENGTH)
    whole = log_probabilities(rg.load(given.model, dtype="float32"), texts)
    warnings.simplefilter("ignore", FallbackWarning)
    for name, plan in recipes():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            receipt = apply(plan, given.model, out, calibration=given.calibration, tokens=16384, length=LENGTH)
            model = rg.load(out, dtype="float32")
            cache = model(texts[0][:, :64], use_cache=True).past_key_values
            kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 2 // 64
            kl, error = divergence(whole, log_probabilities(model, texts))
            size = receipt.bytes_after / 1e6
            print(f"{name:36} {size:6.2f} MB {kept:6} B a token  KL {kl:.4f} ± {error:.4f}", flush=True)


if __name__ == "__main__":
    main()
