"""Text that a model samples from itself, for calibration where the user gives none.

Windows start from what the tokenizer puts before a text (BOS), or, where there is a chat template, from the words that
open a user's turn, so that the model writes the user's words and then its own answer; temperature 1, nothing cut off.
Weights stay in their mapped files where they are stored as they are computed with, so a large model costs little memory
and much time. Legend: B windows at once, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regauge.errors import TextError
from regauge.hosts.transformers.skeleton import silent, skeleton
from regauge.hosts.transformers.source import Source

SMALL = 250_000_000  # parameters: up to here the model is sampled from in float32
BATCH = 64
SENTINEL = "\u2402regauge\u2402"


def opening(tokenizer: Any, vocabulary: int, seed: int) -> tuple[list[int], str]:
    """Ids that every window starts with, and where they come from."""
    if getattr(tokenizer, "chat_template", None):
        start = _chat(tokenizer)
        if start:
            return start, "its chat template"
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    before = whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []
    if before:
        return before, "the start of a text"
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return [int(found)], "the start of a text"
    draw = torch.randint(
        0, vocabulary, (1,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
    )
    return [int(draw)], "a random token"


def _chat(tokenizer: Any) -> list[int]:
    """What the chat template puts before a user's words; nothing where it puts nothing, or cannot be run."""
    from jinja2 import TemplateError

    try:
        told = tokenizer.apply_chat_template([{"role": "user", "content": SENTINEL}], tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
        return []
    before, found, _ = told.partition(SENTINEL)
    return tokenizer.encode(before, add_special_tokens=False) if found and before else []


def whole_model(source: Source) -> Any:
    """transformers' model with its weights: mapped as stored, or in float32 where the model is small."""
    model = skeleton(silent(source.config))
    dtype = torch.float32 if source.parameters() <= SMALL else source.dtype
    found: dict[str, Tensor] = {}
    for block in (None, *range(source.anatomy.blocks)):
        found |= source.scatter(source.anatomy, source.block(block)) | source.extras(block)
    cast = {key: t.to(dtype) if t.is_floating_point() else t for key, t in found.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def sample(
    source: Source,
    tokenizer: Any,
    count: int,
    length: int,
    seed: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, str]:
    """(count, length) token ids that the model draws from itself, and how they begin.

    Cost: one forward pass a token, `BATCH` windows at once.
    """
    if not source.anatomy.causal or "head" not in {site.name for site in source.anatomy.sites}:
        raise TextError(
            f"{source.anatomy.family} does not generate text, so it cannot sample its own calibration text; "
            "give --calibration a file or directory."
        )
    vocabulary = source.anatomy.site("embed").shape[0]
    start, told = opening(tokenizer, vocabulary, seed)
    model = whole_model(source)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    with torch.no_grad():
        for first in range(0, count, BATCH):
            windows = min(BATCH, count - first)
            tick(first, count)
            ids_BT = torch.tensor([start[:length]] * windows, dtype=torch.int64, device="cpu")
            fresh_BT, past = ids_BT, None
            while ids_BT.shape[1] < length:
                out = model(input_ids=fresh_BT, past_key_values=past, use_cache=True)
                past = out.past_key_values
                chances_BV = torch.softmax(out.logits[:, -1, :].float(), dim=-1)
                fresh_BT = torch.multinomial(chances_BV, 1, generator=generator)
                ids_BT = torch.cat([ids_BT, fresh_BT], dim=1)
            rows.append(ids_BT)
    return torch.cat(rows), told
