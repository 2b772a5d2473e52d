"""Ours: an artifact through `rg.load`, one token after another behind a filled cache of a row (`none`: bf16).

A row that lets tokens go chooses among the random keys by its own policy, with random queries. `batch` sequences are
copies of one; more than the native step takes at once go in groups, one behind the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from filled import a_token, pieces, resident
from serve import Loaded, Options, serve

import regauge as rg
from regauge.hosts.transformers.adopting import adopt
from regauge.hosts.transformers.caching import fresh
from regauge.kernels.cpu.step import MOST
from regauge.plan.caches import asked, cache_plan
from regauge.plan.keeping import bytes_at
from regauge.runtime.store.choosing import Asked

MODELS: dict[str, Any] = {}


def filled(model: Any, row: str, tokens: int) -> Any:
    """A cache that has seen so many tokens of one sequence."""
    config, cache = model.config, fresh(model, row)
    layers = adopt(cache, config.num_hidden_layers)
    assert layers is not None
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    shape = (1, heads, config.num_attention_heads // heads)
    for layer in layers:
        chooser: Any = getattr(layer, "chooser", None)
        if chooser is not None:
            chooser.expect(layer, tokens)
        for number, (keys, values) in enumerate(pieces(tokens, heads, size)):
            if not number:
                layer.lazy_initialization(keys, values)
            if row == "none" and not number:
                layer.reserve(tokens, keys, values)
            layer.take(keys, values) if hasattr(layer, "take") else layer.append(keys, values)
        if chooser is not None:
            queries = torch.randn(*shape, max(1, chooser.reads), size, dtype=torch.float32, device="cpu").bfloat16()
            starts = torch.zeros(1, dtype=torch.int64, device="cpu")
            chooser.saw(layer, Asked(queries, starts, size**-0.5), one=False)
    return cache


def counted(model: Any, row: str, tokens: int, cache: Any) -> int:
    """Bytes by the formula; where tokens are let go, as the stores count them."""
    asking = asked(row)
    if asking is None:
        return 4 * tokens * int(model.regauge_anatomy.blocks * cache.layers[0].keys_BHTD[0, :, 0].numel())
    plan = cache_plan(asking, model.regauge_anatomy)
    if any(block is not None and (block.policy or block.merge) for block in plan.blocks):
        return sum(layer.bytes for layer in cache.layers)
    return bytes_at(plan, model.regauge_anatomy, tokens)


@torch.inference_mode()
def load(options: Options) -> Loaded:
    path, row, tokens, batch = options["path"], options["row"], options["context"], options.get("batch", 1)
    if path not in MODELS:
        MODELS[path] = rg.load(Path(path))
    model, count = MODELS[path], options["tokens"]
    warm = filled(model, row, 256)  # what a format makes once is there before memory is looked at
    del warm
    before = resident()
    cache = filled(model, row, tokens)
    grown, held = resident() - before, counted(model, row, tokens, cache)
    groups = -(-batch // MOST)
    sizes = [batch // groups + (number < batch % groups) for number in range(groups)]
    caches = [cache]
    if batch > 1:
        caches = [filled(model, row, tokens) for _ in sizes[1:]] + caches
        for one, size in zip(caches, sizes, strict=True):
            for layer in one.layers:
                layer.reorder(torch.zeros(size, dtype=torch.int64, device="cpu"))
        grown, held = resident() - before, batch * held
    texts = [torch.full((size, 1), 7, dtype=torch.int64, device="cpu") for size in sizes]
    steps, facts = model.regauge_step, {"held": held, "grown": grown, "kind": "int8"}

    @torch.inference_mode()
    def step() -> None:
        for number, one in enumerate(caches):
            logits = model(input_ids=texts[number], past_key_values=one, use_cache=True, logits_to_keep=1).logits
            texts[number] = logits[:, -1].argmax(-1, keepdim=True)

    def run() -> list[float]:
        seen = steps.steps
        found = a_token(step, count)
        if steps.steps == seen:
            facts["notes"] = ["not through the native step"]
        return found

    return Loaded(run, facts)


if __name__ == "__main__":
    serve(load)
