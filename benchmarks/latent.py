"""TransMLA against dropping key and value heads at the same bytes of cache: KL from the original on held-out text.

    python benchmarks/latent.py MODEL --calibration FOLDER --eval FOLDER

Nothing is trained. Of the heads, each is dropped alone from the calibrating text's forward and what that costs in KL is
noted; then the cheapest ones go, of all blocks together, until as many bytes are saved as the latent saves.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common.heldout import divergence, log_probabilities, windows
from torch import Tensor

import regauge as rg

LENGTH = 512


def dropped(model: Any, heads: list[tuple[int, int]]) -> dict[int, Tensor]:
    """Lets heads write nothing; what their blocks' outputs were."""
    kv_heads, before = model.config.num_key_value_heads, {}
    for block, head in heads:
        weight = model.model.layers[block].self_attn.o_proj.weight
        before.setdefault(block, weight.clone())
        width = weight.shape[1] // kv_heads
        weight[:, head * width : (head + 1) * width] = 0
    return before


def restored(model: Any, before: dict[int, Tensor]) -> None:
    for block, weight in before.items():
        model.model.layers[block].self_attn.o_proj.weight.copy_(weight)


def cheapest(model: Any, texts: list[Tensor]) -> list[tuple[int, int]]:
    """(block, key head) of all heads, those first whose absence alone costs the least KL on texts."""
    whole, costs = log_probabilities(model, texts), []
    for block in range(model.config.num_hidden_layers):
        for head in range(model.config.num_key_value_heads):
            before = dropped(model, [(block, head)])
            costs.append((divergence(whole, log_probabilities(model, texts))[0], (block, head)))
            restored(model, before)
    return [which for _, which in sorted(costs)]


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384)
    given = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    texts, read = (
        windows(tokenizer, given.eval, given.windows, LENGTH),
        windows(tokenizer, given.calibration, 2, LENGTH),
    )
    model = rg.load(given.model, dtype="float32")
    want, config = log_probabilities(model, texts), model.config
    heads = cheapest(model, read)
    cached = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    for keep in (75, 50, 25):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            rg.apply(
                f"transmla-r{keep}", given.model, out, calibration=given.calibration, tokens=given.tokens, length=LENGTH
            )
            made = rg.load(out, dtype="float32")
            numbers = (made.config.kv_lora_rank + made.config.qk_rope_head_dim) * config.num_hidden_layers
            kl, error = divergence(want, log_probabilities(made, texts))
        gone = heads[: round(len(heads) * (1 - keep / 100))]
        before = dropped(model, gone)
        other, error_2 = divergence(want, log_probabilities(model, texts))
        restored(model, before)
        left = cached * (len(heads) - len(gone)) // len(heads)
        print(
            f"transmla-r{keep}: {2 * numbers} bytes a token, KL {kl:.4f} ± {error:.4f}; heads dropped: {2 * left} "
            f"bytes, KL {other:.4f} ± {error_2:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
