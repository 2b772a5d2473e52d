"""Latent attention (DeepSeek's form, 2405.04434) that decodes from the latent itself, all that the cache holds.

transformers keeps the latent and the turned key of a token, and makes keys and values of all heads from all of them
again at every token. Here the product that would make the keys is taken into the queries, and that of the values into
the output (absorbed): q · (W c) = (Wᵀ q) · c. A token then reads every row of the cache once, for all heads, as one key
head whose keys are rows and whose values are the rows' latents:

    cost of Q new tokens over T, a head: made again T·r·(N + V) + Q·T·(N + R + V); absorbed Q·r·(N + V) + Q·T·2·(r + R)

`absorb` lets a loaded model of such a family do that. What it does not serve (prompts, training, an attention backend
other than torch's, weights whose inputs are read quantised) goes through transformers' own expansion.

Legend: B sequences, H heads, Q new tokens, T tokens, r numbers of a latent, R turned channels, N and V channels of a
head's keys (not turned) and values.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regauge.hosts.transformers.cache import OwnLayer
from regauge.hosts.transformers.owned import method, own
from regauge.runtime.matrices.modules import Made, PackedLinear

NAME = "regauge_latent"
"""Under which transformers finds `attention`."""
KINDS = ("deepseek_v2", "deepseek_v3")
LATENT, LAYER = "regauge_latent", "regauge_layer"
"""Attributes: of a module, its `Latent`; of what a layer returns, the layer."""
NEW = 16
"""New tokens of a sequence that are decoded, at most; more are a prompt."""


class LatentLayer(OwnLayer):
    """A layer of the cache whose rows are latent and turned key beside each other, in one memory: `keys`. Its `values`
    have no channels.

    Attributes:
        rank: numbers of a latent.
    """

    rank = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends latents (B, 1, T, r) and turned keys (B, 1, T, R), and gives all that are held, as views."""
        self.rank = key_states.shape[-1]
        rows, _ = super().update(torch.cat((key_states, value_states), -1), value_states[..., :0])
        latents, turned = rows[..., : self.rank], rows[..., self.rank :]
        setattr(latents, LAYER, self)
        return latents, turned


@dataclass
class Latent:
    """What a module of latent attention is given.

    Attributes:
        config: the model's own, which says by what it is to attend.
        held_OI: the decoded matrix behind the latent, where that is packed; of the dtype and device that it was last
            asked for in.
    """

    config: Any
    held_OI: Tensor | None = None


def absorb(model: Any) -> None:
    """Lets a loaded model with latent attention decode from its latent. Does nothing to others, nor to a model whose
    blocks come and go in a window of memory."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in KINDS or getattr(model, "regauge_window", None) is not None:
        return
    AttentionInterface.register(NAME, attention)
    for module in model.modules():
        if hasattr(module, "expand_kv") and not hasattr(module, LATENT):
            setattr(module, LATENT, Latent(module.config))
            module.config = copy.copy(module.config)
            module.config._attn_implementation = NAME
            module.__class__ = _compressed(cast(Hashable, type(module)))
    own(model, "forward", _forward)


@cache
def _compressed(old: Hashable) -> type:
    """A class of attention that hands on what the cache holds, not keys and values made of it."""
    assert isinstance(old, type), "a class"

    def expand_kv(module: Any, latents: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        return latents, turned

    own = {"expand_kv": expand_kv, "made": (_compressed, old), "__module__": old.__module__}
    return Made(old.__name__, (old,), own)


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's own `forward`, over a cache whose layers are ours."""
    cache: Any = kwargs.get("past_key_values")
    if type(cache) is DynamicCache and not cache.offloading:
        adopt(cache, model.config.get_text_config(decoder=True).num_hidden_layers)
    return method(model, "forward")(*args, **kwargs)


def adopt(cache: Any, blocks: int) -> None:
    """Makes the layers of a dynamic cache latent ones, in place; what they hold stays."""
    layers = cache.layers
    layers += [DynamicLayer() for _ in range(blocks - len(layers))]
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[number] = LatentLayer()
            if layer.get_seq_length():
                layers[number].update(layer.keys, layer.values)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers asks of an attention function.

    Args:
        query: (B, H, Q, N + R); key: latents (B, 1, T, r), and value: turned keys (B, 1, T, R), the new ones last.
        attention_mask: as the model's own backend has it.
    """
    latent: Latent = getattr(module, LATENT)
    name = latent.config._attn_implementation
    layer: LatentLayer | None = getattr(key, LAYER, None)
    new, tokens = query.shape[2], key.shape[2]
    if layer is not None and name == "sdpa" and new <= NEW and new < tokens and not module.training:
        heads_OI = matrix(module, latent, query)
        if heads_OI is not None and _cheaper(module, new, tokens):
            rows = layer.keys
            assert rows is not None, "it has just been written"
            return absorbed(query, rows, heads_OI, attention_mask, scaling, module.qk_nope_head_dim), None
    old = type(module).__mro__[1]
    keys, values = old.expand_kv(module, key, value)  # type: ignore[attr-defined]  # transformers is untyped
    eager = getattr(sys.modules[old.__module__], "eager_attention_forward", None)
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    found: tuple[Tensor, Tensor | None] = plain(module, query, keys, values, attention_mask, scaling=scaling, **rest)
    return found


def _cheaper(module: Any, new: int, tokens: int) -> bool:
    """Whether absorbed products take fewer multiplications."""
    rank, turned = module.kv_lora_rank, module.qk_rope_head_dim
    free, size = module.qk_nope_head_dim, module.v_head_dim
    again = tokens * rank * (free + size) + new * tokens * (free + turned + size)
    return bool(new * rank * (free + size) + new * tokens * 2 * (rank + turned) < again)


def matrix(module: Any, latent: Latent, like: Tensor) -> Tensor | None:
    """(O, I) of the layer that makes keys and values of latents; None where its product is more than a matrix's.

    A packed one is decoded once, and held.
    """
    layer = module.kv_b_proj
    if layer._forward_hooks or layer._forward_pre_hooks or layer.bias is not None:
        return None
    if type(layer) is nn.Linear:
        return layer.weight
    if type(layer) is not PackedLinear or any(getattr(part, "reading", None) is not None for part in layer.parts):
        return None
    held = latent.held_OI
    if held is None or held.dtype != like.dtype or held.device != like.device:
        parts: list[Any] = list(layer.parts)
        held = torch.cat([part.rows(0, part.shape[0]) for part in parts]).to(like)
        latent.held_OI = held = held if layer.place is None else held[layer.place]
    return held


def absorbed(
    query: Tensor, rows_B1TC: Tensor, heads_OI: Tensor, mask: Tensor | None, scaling: float, free: int
) -> Tensor:
    """(B, Q, H, V): attention of the queries over the rows of the cache.

    Args:
        query: (B, H, Q, N + R); `free` is N.
        rows_B1TC: latent and turned key, r + R numbers.
        heads_OI: (H · (N + V), r).
        mask: bool (B, 1, Q, T or more), or added; None: one new token, which sees all.
    """
    (batch, heads, new, _), tokens, rank = query.shape, rows_B1TC.shape[2], heads_OI.shape[1]
    heads_HOr = heads_OI.view(heads, -1, rank)
    keys_HNr, values_HVr = heads_HOr[:, :free], heads_HOr[:, free:]
    asked_BHQC = torch.cat((query[..., :free] @ keys_HNr, query[..., free:]), -1)
    if mask is not None:
        mask = mask[..., :tokens].expand(batch, 1, new, tokens)
        mask = mask.unsqueeze(2).expand(batch, 1, heads, new, tokens).reshape(batch, 1, heads * new, tokens)
    # values as wide as keys let torch's kernels take them in one pass; their turned channels are read by none
    read_B1RC = nn.functional.scaled_dot_product_attention(
        asked_BHQC.reshape(batch, 1, heads * new, -1), rows_B1TC, rows_B1TC, attn_mask=mask, scale=scaling
    )
    out_BHQV: Tensor = read_B1RC.view(batch, heads, new, -1)[..., :rank] @ values_HVr.mT
    return out_BHQV.transpose(1, 2).contiguous()
