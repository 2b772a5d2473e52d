"""The thin loop over the native step, for those who want every millisecond."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regauge.errors import ModelError, SettingError
from regauge.hosts.transformers.caching import fresh
from regauge.hosts.transformers.drafting import preferred, streamed
from regauge.hosts.transformers.source import read_tokenizer


def stream(
    model: Any,
    prompt: str | Sequence[int] | Tensor,
    max_new_tokens: int = 256,
    choose: Callable[[Tensor], int] | None = None,
    stop: Sequence[int] | None = None,
    *,
    text: bool = False,
) -> Iterator[Any]:
    """Token ids, one at a time, as the model makes them; or pieces of text.

        for piece in rg.stream(model, "def mean(values):", max_new_tokens=64, text=True):
            print(piece, end="", flush=True)

    Nothing of `generate` runs in between: no logits processors, no stopping criteria but `stop`. With
    `model.generation_config.drafts = "lookup"` several tokens are guessed for one step, and are the same.

    Args:
        model: of `rg.load`.
        prompt: text (the tokenizer is read from the model's directory), or token ids of one sequence.
        choose: logits (V,) float32 → the next id; None: the largest.
        stop: ids that end the text, and are not given; None: the generation config's.
        text: pieces of text are given, each as soon as its characters are whole; the model's directory has the
            tokenizer.

    Raises:
        SettingError: the prompt is empty, longer than the model reads, of several sequences, of ids that the model
            lacks or text without a tokenizer; `max_new_tokens` is below 1; or the model makes no text. Before the first
            token.
    """
    if max_new_tokens < 1:
        raise SettingError(f"max_new_tokens={max_new_tokens} asks for nothing; give 1 or more")
    if not model.can_generate():
        raise SettingError(f"{type(model).__name__} makes no text; load a causal language model")
    ends, ids = _ends(model) if stop is None else stop, _ids(model, prompt)
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or ids.shape[1]
    if ids.shape[1] > most:
        raise SettingError(f"the prompt has {ids.shape[1]} tokens and the model reads {most} at once; shorten it")
    choose = choose or _largest
    drafts = preferred(model)
    if drafts is None:
        found = _loop(model, ids, max_new_tokens, choose, frozenset(ends))
    else:
        found = _until(streamed(model, ids, fresh(model), drafts, choose, max_new_tokens), frozenset(ends))
    return pieces(found, _tokenizer(model, "leave text out")) if text else found


def pieces(tokens: Iterator[int], tokenizer: Any) -> Iterator[str]:
    """Text of tokens as they come: a piece is given when its last character is whole."""
    held: list[int] = []
    shown = ""
    for token in tokens:
        held.append(token)
        told = tokenizer.decode(held, skip_special_tokens=True)
        if told.endswith("\ufffd"):  # in the middle of a character of several bytes
            continue
        yield told[len(shown) :]
        shown = told
        if len(held) > HELD:  # what came before bears on what follows by a blank at most
            held, shown = held[-1:], tokenizer.decode(held[-1:], skip_special_tokens=True)
    if held:
        yield tokenizer.decode(held, skip_special_tokens=True)[len(shown) :]


HELD = 64  # tokens that are decoded together


def _tokenizer(model: Any, otherwise: str) -> Any:
    try:
        return read_tokenizer(Path(model.config._name_or_path))
    except ModelError as error:
        raise SettingError(f"{error}; or {otherwise}") from error


def _largest(logits_V: Tensor) -> int:
    return int(logits_V.argmax())


def _loop(
    model: Any, ids: Tensor, max_new_tokens: int, choose: Callable[[Tensor], int], ends: frozenset[int]
) -> Iterator[int]:
    cache = fresh(model)
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = choose(logits[0, -1].float())
        if token in ends:
            return
        yield token
        ids = torch.tensor([[token]], dtype=torch.int64, device=ids.device)


def _until(tokens: Iterator[int], ends: frozenset[int]) -> Iterator[int]:
    for token in tokens:
        if token in ends:
            return
        yield token


def _ids(model: Any, prompt: str | Sequence[int] | Tensor) -> Tensor:
    if isinstance(prompt, str):
        prompt = _tokenizer(model, "give token ids as the prompt")(prompt).input_ids
    ids = torch.as_tensor(prompt)
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise SettingError(f"a prompt is one sequence of at least one token, not ids of shape {list(ids.shape)}")
    rows = model.get_input_embeddings().num_embeddings
    if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise SettingError(f"the ids of a prompt are integers from 0 to {rows - 1}, as the model's vocabulary is")
    return ids.long().to(model.device)


def _ends(model: Any) -> Sequence[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else found
