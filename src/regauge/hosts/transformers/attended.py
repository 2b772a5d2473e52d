"""Attention of transformers' modules computed by somebody else, while that lasts.

Modules find their attention function by a name in their config. Ours is registered under a name of its own when it is
first wanted, and a shell's configs bear that name only meanwhile; whom it asks is a variable of the context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from regauge.hosts.heads import Attend, Heads

NAME = "regauge-heads"
PLAIN = ("dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "sliding_window")
"""What a call may say that changes no sum: the mask has it already, or it is off."""
_ASKED: ContextVar[Attend | None] = ContextVar("regauge_attend", default=None)


@contextmanager
def attended(layers: Iterable[nn.Module], change: Attend) -> Iterator[None]:
    """While it lasts, attention of some blocks goes through `change`; what has a function of its own does not."""
    modules = (module for layer in layers for module in layer.modules())
    configs = {id(c): c for module in modules if (c := getattr(module, "config", None)) is not None}
    before = {at: config._attn_implementation_internal for at, config in configs.items() if _named(config)}
    AttentionInterface.register(NAME, _attention)
    asked = _ASKED.set(change)
    try:
        for at in before:
            configs[at]._attn_implementation_internal = NAME
        yield
    finally:
        _ASKED.reset(asked)
        for at, name in before.items():
            configs[at]._attn_implementation_internal = name


def _named(config: Any) -> bool:
    return getattr(config, "_attn_implementation_internal", None) is not None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention function: query (B, H, T, D), key and value (B, K, S, ·)."""

    def plain() -> Tensor:
        found: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)[0]
        return found

    beyond = tuple(name for name, what in rest.items() if name not in PLAIN and what is not None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    change = _ASKED.get()
    heads = Heads(query, key, value, attention_mask, scale, plain, beyond)
    return (plain() if change is None else change(heads)), None
