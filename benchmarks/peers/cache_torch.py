"""transformers in bf16, one token after another behind a filled cache: its own full one, its quantised ones (quanto,
HQQ, FP8), or what a press of kvpress leaves of the full one (`row`: `full`, `quanto 2`, `hqq 4`, `fp8`, `knorm`, ...).

Runs in the environment that has the backend (`setup.py caches`, `setup.py kvpress`).
"""

from __future__ import annotations

from typing import Any

import torch
from filled import a_token, pieces, resident
from serve import Loaded, Options, serve
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, QuantizedCache

MODELS: dict[str, Any] = {}
GROUP, RESIDUAL = 64, 128
"""transformers' own settings."""


def filled(model: Any, row: str, tokens: int) -> Any:
    """A cache that has seen so many tokens of one sequence."""
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    backend, _, bits = row.partition(" ")
    press: Any = None
    if backend in ("quanto", "hqq"):
        axis = 1 if backend == "hqq" else 0
        cache: Any = QuantizedCache(
            backend, config, nbits=int(bits), axis_key=axis, axis_value=axis, q_group_size=GROUP,
            residual_length=RESIDUAL,
        )  # fmt: skip
    elif backend == "fp8":
        cache = QuantizedCache(backend, config)
    else:
        cache = DynamicCache(config=config)
        press = None if row == "full" else made(row)
    for number in range(config.num_hidden_layers):
        for keys, values in pieces(tokens, heads, size, at_once=tokens):
            if press is not None:
                module = model.model.layers[number].self_attn
                hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, device="cpu")
                keys, values = press.compress(module, hidden, keys, values, None, {})
            cache.update(keys.contiguous(), values.contiguous(), number)
    return cache


def made(row: str) -> Any:
    """A press that keeps half."""
    import kvpress

    return {"knorm": kvpress.KnormPress, "streaming": kvpress.StreamingLLMPress}[row](compression_ratio=0.5)


@torch.inference_mode()
def load(options: Options) -> Loaded:
    path, row, tokens = options["path"], options["row"], options["context"]
    if path not in MODELS:
        MODELS[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True).eval()
    model = MODELS[path]
    warm = filled(model, row, 256)
    del warm
    before = resident()
    cache = filled(model, row, tokens)
    facts: dict[str, Any] = {"grown": resident() - before, "kind": "bf16"}
    state = {"ids": torch.full((1, 1), 7, dtype=torch.int64, device="cpu"), "at": tokens}

    @torch.inference_mode()
    def step() -> None:
        at = torch.full((1, 1), state["at"], dtype=torch.int64, device="cpu")
        ids = state["ids"]
        logits = model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        state["ids"], state["at"] = logits[:, -1].argmax(-1, keepdim=True), state["at"] + 1

    return Loaded(lambda: a_token(step, options["tokens"]), facts)


if __name__ == "__main__":
    serve(load)
