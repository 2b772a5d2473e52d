"""One prefix and its continuations in one exact forward pass: Prefix Grouper (arXiv 2506.05433).

The prefix stands once, its continuations behind it, in one row: everything but attention sees that row and nothing
else. Attention is in parts, each by the model's own function: the prefix looks at itself, and every continuation at the
prefix and itself. So outputs and gradients are those of the plain batch, in which each continuation brings the prefix
along.

Legend: P tokens of the prefix, S of a continuation, T of the row, H heads, D head size, X what the model gives a token.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regauge.errors import ModelError, SettingError

NAME = "regauge_shared_prefix"
"""Of the attention function. transformers makes no mask for a name that it has none for."""
PARTS = ("eager", "sdpa")
"""Attention functions that take a mask, by which the parts are computed; any other is replaced by the last."""
AT_ONCE = 1024
"""Tokens of continuations that look at the prefix together: each such part copies keys and values of the prefix."""


@dataclass(eq=False)
class Shared:
    """A prefix and its continuations as one row.

    Attributes:
        inputs: what the model is called with: `model(**shared.inputs)`.
        prefix: P.
        lengths: S of each continuation.
    """

    inputs: Mapping[str, Any]
    prefix: int
    lengths: tuple[int, ...]
    by: str = PARTS[-1]
    calls: int = 0
    masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """T."""
        return self.prefix + sum(self.lengths)

    def split(self, outputs: Tensor) -> list[Tensor]:
        """What the model gave, (1, T, X), or (1, 1 + ΣS, X) without all of the prefix but its last token → (1 + S, X)
        of each continuation. The first row is the output at the last token of the prefix, which predicts the first of
        the continuation: it is the same in all, and takes the gradients of all.

        Raises:
            ModelError: nothing ran, or the model's attention is not asked for by its config.
            SettingError: the outputs are of another shape.
        """
        if not self.calls:
            raise ModelError("no attention ran through the shared prefix: call the model inside the `with`, as it is")
        count = outputs.shape[1] if outputs.ndim == 3 else 0
        if count not in (self.total, self.total - self.prefix + 1) or len(outputs) != 1:
            raise SettingError(
                f"outputs of shape {list(outputs.shape)} are not those of a row of {self.total} tokens; give the "
                "logits or states of model(**shared.inputs)"
            )
        rows = outputs[0, count - sum(self.lengths) - 1 :]
        ends = list(accumulate(self.lengths, initial=1))
        return [torch.cat((rows[:1], rows[start:stop])) for start, stop in pairwise(ends)]

    def log_probs(self, logits: Tensor) -> list[Tensor]:
        """(S,) of each continuation: of its tokens, each given all before it, in nats, float32 or better.

        Args:
            logits: as of `split`, X the vocabulary.
        """
        ids = self.inputs["input_ids"][0, self.prefix :].split(self.lengths)
        found = []
        for rows, targets in zip(self.split(logits), ids, strict=True):
            rows = rows[:-1].to(torch.promote_types(rows.dtype, torch.float32))
            found.append(rows.log_softmax(-1).gather(1, targets.unsqueeze(1))[:, 0])
        return found


@contextmanager
def shared_prefix(model: Any, prefix: Tensor | Sequence[int], continuations: Sequence[Any]) -> Iterator[Shared]:
    """Scores or trains on several continuations of one prefix that is computed once, exactly.

        with rg.shared_prefix(model, prompt_ids, [answer_ids, other_ids]) as shared:
            logits = model(**shared.inputs).logits
            loss = -sum(one.sum() for one in shared.log_probs(logits))
            loss.backward()

    While the `with` lasts, the model's attention is ours, and the model is called with `shared.inputs` alone. With
    gradient checkpointing the backward pass must lie inside too: outside, torch refuses it. Without dropout, outputs
    and gradients equal those of the plain batch but for the order of sums.

    Args:
        model: of transformers or `rg.load`, whose config chooses its attention, full or behind a window.
        prefix: (P,) ids, one or more.
        continuations: (S,) ids each, one or more, of any lengths; none is padded.

    Raises:
        ModelError: the model's attention is its own, remembers more than keys and values, or is shared already.
        SettingError: there is no prefix, no continuation, or an id that the model lacks.

    Reference: Prefix Grouper, arXiv 2506.05433, with `include_prefix_last=1`. Differs: continuations are not padded,
    and as many as fit `AT_ONCE` tokens look at the prefix together, so that it is not repeated for each.
    """
    configs = _configs(model)
    shared = _row(model, prefix, continuations)
    before = [(config, config._attn_implementation) for config in configs]
    if any(was == NAME for _, was in before):
        raise ModelError("this model shares a prefix already; leave that `with` first")
    shared.by = before[0][1] if before[0][1] in PARTS else PARTS[-1]
    AttentionInterface.register(NAME, _attend)
    for config in configs:
        _active[id(config)] = shared
        config._attn_implementation = NAME
    try:
        yield shared
    finally:
        for config, was in before:
            config._attn_implementation = was
            del _active[id(config)]


_active: dict[int, Shared] = {}
"""Number of a config → what its model shares now: an attention function is given its module alone."""


def _configs(model: Any) -> list[Any]:
    """The configs by which the model's blocks choose their attention."""
    body, name = model.get_decoder(), type(model).__name__
    kinds = set(getattr(body.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not body._supports_attention_backend or body._is_stateful or kinds:
        raise ModelError(
            f"the attention of {name} is not chosen by its config alone, so a prefix cannot be shared in it; repeat "
            "the prefix before each continuation"
        )
    found = {id(module.config): module.config for module in body.modules() if "config" in vars(module)}
    return list(found.values())


def _row(model: Any, prefix: Any, continuations: Sequence[Any]) -> Shared:
    """The row of one prefix and its continuations."""
    parts = [torch.as_tensor(part) for part in (prefix, *continuations)]
    rows = model.get_input_embeddings().num_embeddings
    if len(parts) < 2:
        raise SettingError("there is no continuation of the prefix; give one or more")
    for part in parts:
        if part.ndim != 1 or not part.numel() or part.is_floating_point():
            raise SettingError(
                f"prefix and continuations are ids of one dimension each, not of shape {list(part.shape)}"
            )
        if int(part.min()) < 0 or int(part.max()) >= rows:
            raise SettingError(f"ids are integers from 0 to {rows - 1}, as the model's vocabulary is")
    ids = torch.cat(parts).long().to(model.device)
    lengths = tuple(len(part) for part in parts[1:])
    first = len(parts[0])
    inputs: dict[str, Any] = {"input_ids": ids.unsqueeze(0), "use_cache": False}
    inputs["position_ids"] = _positions(first, lengths).unsqueeze(0).to(model.device)
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        inputs["logits_to_keep"] = torch.arange(first - 1, len(ids), dtype=torch.int64, device=model.device)
    return Shared(inputs, first, lengths)


def _positions(first: int, lengths: Sequence[int]) -> Tensor:
    """(T,): each continuation goes on where the prefix ends."""
    ends = torch.tensor([first, *(first + s for s in lengths)], dtype=torch.int64, device="cpu")
    counts = torch.tensor([first, *lengths], dtype=torch.int64, device="cpu")
    whole = torch.arange(int(counts.sum()), dtype=torch.int64, device="cpu")
    begins = (ends - counts).repeat_interleave(counts)
    return begins + whole - (counts.cumsum(0) - counts).repeat_interleave(counts)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention of one block over the row: queries, keys and values (1, H, T, D) → (1, T, H, D)."""
    shared = _active[id(module.config)]
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == shared.total:
        raise ModelError("inside rg.shared_prefix the model is called with shared.inputs, without a cache, and no more")
    shared.calls += 1
    function, rest = _function(module, shared.by), args[1:]
    options = {name: given for name, given in kwargs.items() if name != "attention_mask"}
    window, first = int(kwargs.get("sliding_window") or 0), shared.prefix
    plain = shared.by == "sdpa" and not 0 < window < first  # which is faster without a mask
    alone = None if plain else _mask(shared, range(0), window, query)
    found = [function(module, *(x[:, :, :first] for x in (query, key, value)), alone, *rest, **options)[0]]
    for some in _together(shared.lengths):
        start = first + sum(shared.lengths[: some.start])
        stop = start + sum(shared.lengths[some.start : some.stop])
        seen = (torch.cat((x[:, :, :first], x[:, :, start:stop]), 2) for x in (key, value))
        mask = _mask(shared, some, window, query)
        found.append(function(module, query[:, :, start:stop], *seen, mask, *rest, **options)[0])
    return torch.cat(found, 1), None


def _function(module: Any, by: str) -> Any:
    """The attention function that a module would have used."""
    if by == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[by]


def _together(lengths: Sequence[int]) -> list[range]:
    """Which continuations look at the prefix together: as many as fit."""
    found: list[range] = []
    start = 0
    for number in range(1, len(lengths) + 1):
        if number == len(lengths) or sum(lengths[start : number + 1]) > AT_ONCE:
            found.append(range(start, number))
            start = number
    return found


def _mask(shared: Shared, some: range, window: int, query: Tensor) -> Tensor:
    """(1, 1, Q, K) of what some continuations see of the prefix and themselves, or of the prefix alone: true where they
    do, or, for a function that adds it, 0 there and the least number elsewhere."""
    key = (some, window, query.dtype, query.device)
    if key not in shared.masks:
        lengths, first = [shared.lengths[number] for number in some], shared.prefix
        whose = torch.tensor(
            [-1] * first + [n for n, s in enumerate(lengths) for _ in range(s)], dtype=torch.int64, device="cpu"
        )
        at = _positions(first, lengths)
        rows = slice(first if lengths else 0, None)
        seen_QK = (whose == -1) | (whose == whose[rows, None])
        back_QK = at[rows, None] - at
        seen_QK &= (back_QK >= 0) & (back_QK < window) if window else back_QK >= 0
        mask = seen_QK.to(query.device)
        if shared.by == "eager":
            least = torch.finfo(query.dtype).min
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, least)
        shared.masks[key] = mask[None, None]
    return shared.masks[key]
