"""Edits of a cached text: what one costs beside reading the text again, and how far it is from having read it.

    python benchmarks/edit.py                                # 135M shape, 8k tokens; the bundled model on this project
    python benchmarks/edit.py --model DIR --text FILE        # the gap on a model and text of your own

The cost, in seconds and in seconds of processors, is of random weights, a model of transformers in bf16: ten tokens
inserted in the middle; beside it the bytes that such an edit has to move. The gap is KL from the model that read the
edited text to the one whose cache was edited, over the tokens that come next; beside it, what keys that stay where they
were lose (the cache is cut open and the new tokens are put in: what PIE turns).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.shapes import SHAPES, config
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import regauge as rg

ROOT = Path(__file__).resolve().parent.parent
NEXT, NEW = 32, 10  # tokens that are judged, and that are inserted


def timed(what: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, seconds, and seconds of processors."""
    began, spent = time.perf_counter(), time.process_time()
    found = what()
    return found, time.perf_counter() - began, time.process_time() - spent


def cost(tokens: int, rounds: int) -> None:
    """Seconds of reading and of editing."""
    shape = SHAPES["smollm-135m"]
    settings = {name: value for name, value in config(shape).items() if name not in ("architectures", "model_type")}
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()  # type: ignore[arg-type]
    torch.set_default_dtype(torch.float32)
    ids, new = (torch.randint(shape.vocabulary, (1, count)) for count in (tokens, NEW))
    with torch.no_grad():
        cache, whole, spent = timed(lambda: model(ids, use_cache=True, logits_to_keep=1).past_key_values)
    print(f"{shape.name}, {tokens:,} tokens: read in {whole:.2f} s ({spent:.2f} s of processors)", flush=True)
    held = sum(layer.keys.nbytes for layer in cache.layers)
    print(f"to be moved: {2 * held / 1e6:.0f} MB of keys and values, of which {held / 2e6:.0f} MB turn", flush=True)
    told, found = [(tokens // 2, 0, new[0])], []
    now, edit = rg.cache.Edited(cache, ids, None), rg.cache.edit
    for number in range(rounds + 1):  # the first also finds out how the model's keys turn
        one, *seconds = timed(lambda: edit(model, now.cache, now.ids, told))  # noqa: B023  # called at once
        found.append(seconds)
        if number == rounds - 1:
            now = one  # the last is an edit of what was edited
    then = sorted(found[1:-1])[len(found[1:-1]) // 2]
    for what, (wall, own) in (("the first edit", found[0]), ("then", then), ("after another edit", found[-1])):
        print(
            f"{NEW} tokens in the middle, {what}: {wall:.3f} s, {wall / whole:.2%} of reading "
            f"({own:.3f} s of processors, {own / spent:.2%})",
            flush=True,
        )


def gap(folder: Path, text: str, length: int, texts: int) -> None:
    """KL to the model that read the edited text, of an edited cache and of one whose keys stay."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), rg.load(folder, dtype="float32")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    step = len(ids) // texts
    if step < length + NEW:
        raise SystemExit(f"the text has {len(ids)} tokens, and {texts} texts of {length} were asked for")
    found: dict[str, list[float]] = {"edited": [], "keys that stay": [], "not edited": []}
    for number in range(texts):
        new, first = ids[number * step : number * step + length + NEW][None], length // 2
        old = torch.cat((new[:, :first], new[:, first + NEW :]), 1)
        with torch.no_grad():
            wanted = model(new, logits_to_keep=NEXT).logits[0].log_softmax(-1)
            cache = model(old[:, :-NEXT], use_cache=True).past_key_values
        edited = rg.cache.edit(model, cache, old, [(first, 0, new[0, first : first + NEW])])
        stay = _stay(model, cache, edited.cache, first)
        found["edited"].append(_kl(model, new, edited.cache, wanted))
        found["keys that stay"].append(_kl(model, new, stay, wanted))
        found["not edited"].append(_kl(model, old, cache, wanted))
    told = ", ".join(f"{name} {sum(kl) / len(kl):.4f}" for name, kl in found.items())
    print(
        f"{folder.name}, {texts} texts of {length} tokens, {NEW} inserted in the middle; nats a token: {told}",
        flush=True,
    )


def _stay(model: Any, old: Any, edited: Any, first: int) -> Any:
    """The edited cache with keys behind the edit as they were."""
    found = DynamicCache(config=model.config)
    for number, (layer, before) in enumerate(zip(edited.layers, old.layers, strict=True)):
        keys = torch.cat((layer.keys[:, :, : first + NEW], before.keys[:, :, first:]), 2)
        found.update(keys, layer.values, number)
    return found


def _kl(model: Any, ids: Tensor, cache: Any, wanted: Tensor) -> float:
    """Of the last tokens, read one call after the cache."""
    with torch.no_grad():
        held = cache.get_seq_length()
        logits = model(
            ids[:, held:], position_ids=torch.arange(held, ids.shape[1])[None], past_key_values=cache
        ).logits[0, -NEXT:]
    return float((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean())


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    words.add_argument("--tokens", type=int, default=8192, help="0: no cost")
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--model", type=Path, default=ROOT / "bundled" / "code-llama-5m")
    words.add_argument("--text", type=Path, default=ROOT / "docs" / "LOG.md")
    words.add_argument("--length", type=int, default=400)
    words.add_argument("--texts", type=int, default=24, help="0: no gap")
    given = words.parse_args()
    torch.manual_seed(0)
    if given.texts:
        gap(given.model, given.text.read_text(encoding="utf-8", errors="replace"), given.length, given.texts)
    if given.tokens:
        cost(given.tokens, given.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
