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
from regauge.hosts.transformers.configs import first_line
from regauge.hosts.transformers.experts import plain_experts
from regauge.hosts.transformers.skeleton import silent, skeleton
from regauge.hosts.transformers.source import Source

SMALL = 250_000_000  # parameters: up to here the model is sampled from in float32
BATCH = 64
SENTINEL = "\u2402regauge\u2402"


def opening(tokenizer: Any, vocabulary: int, seed: int, room: int = 128) -> tuple[list[int], str]:
    """Ids that every window starts with, and where they come from.

    Args:
        vocabulary: rows of the model's table of embeddings; what begins with another id is passed over, and said.
        room: most tokens that the opening may have.
    """
    passed = ""
    if getattr(tokenizer, "chat_template", None):
        start, why = _chat(tokenizer)
        if why == "" and len(start) > room:
            why = f"writes {len(start)} tokens before them"
        if why == "" and max(start) >= vocabulary:
            why = f"begins with token {max(start)}, and the model's table has {vocabulary} rows"
        if why == "":
            return start, "its chat template"
        passed = f" (its chat template, which should write what comes before a user's words, {why})"
    whole, bare = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    before = whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []
    ends = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    for found in (before, *([int(end)] for end in ends if end is not None)):
        if found and max(found) < vocabulary:
            return found[:room], f"the start of a text{passed}"
    draw = torch.randint(
        0, vocabulary, (1,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
    )
    return [int(draw)], f"a random token{passed}"


def _chat(tokenizer: Any) -> tuple[list[int], str]:
    """What the chat template puts before a user's words; or nothing, and why."""
    try:
        told = tokenizer.apply_chat_template([{"role": "user", "content": SENTINEL}], tokenize=False)
        before, found, _ = told.partition(SENTINEL)
    except Exception as error:  # a template is a program that came with the model: it may raise whatever it likes
        return [], f"cannot be run: {type(error).__name__} {first_line(error)[:80]}"
    start = tokenizer.encode(before, add_special_tokens=False) if found and before else []
    return start, "" if start else "writes nothing" if found else "does not write them"


def whole_model(source: Source, dtype: torch.dtype | None = None) -> Any:
    """transformers' model with its weights, in a dtype: mapped where they are stored so. None: as they are stored, or
    in float32 where the model is small."""
    config = silent(source.config)
    plain_experts(config, source.anatomy)
    model = skeleton(config)
    if dtype is None:
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
    start, told = opening(tokenizer, vocabulary, seed, max(1, length // 2))
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
