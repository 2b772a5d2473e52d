"""The attention function of a model whose cache lets tokens go: it sees the queries, and serves heads of uneven length.

transformers hands an attention function queries, keys and values, not the cache. A packed layer marks the keys that it
returns with a `Mark`, which leads back to it. The mark is lost where a family makes other keys of them before it
attends, or attends by another function; the layer finds out at its next call, and refuses.

`attend` registers the function, under `NAME`, when a model with such a cache is loaded; importing does nothing. The
name must not look like another of transformers' (flash, sdpa, flex_attention, paged|).

Legend: B sequences, Q new tokens, H query heads, K KV heads, G query heads of one, T rows of keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from regauge.attention.maps import causal, first_seen, probabilities, shown
from regauge.cache.base import Layer, Rotary
from regauge.cache.scheme import CachePlan
from regauge.cache.triggers import check_tokens
from regauge.errors import SettingError
from regauge.hosts.transformers.coding import attended
from regauge.hosts.transformers.skeleton import body_prefix
from regauge.hosts.transformers.tables import table_for
from regauge.runtime.store.choosing import Asked, Chooser
from regauge.runtime.store.sharing import Sharer

NAME = "regauge"
MARK = "regauge_mark"
EXACT = ("softcap", "s_aux")
"""What torch's attention does not compute: a cap on the products, and sinks that are numbers of the model."""


@dataclass(frozen=True, eq=False)
class Mark:
    """What keys that a layer has returned lead back to.

    Attributes:
        layer: the layer of the cache.
        held_BKT: which rows of the keys are tokens; None: all, in the order of the text.
        window: how many of the last rows are the last of the text; the others come before them. 0: the keys are of
            new tokens alone, and the layer's codes are to be read.
    """

    layer: Any
    held_BKT: Tensor | None
    window: int


def marked(keys: Tensor, layer: Any, held_BKT: Tensor | None, window: int) -> Tensor:
    """The same keys, with a mark."""
    keys = keys.view_as(keys)  # the model keeps its own
    setattr(keys, MARK, Mark(layer, held_BKT, window))
    return keys


def attend(model: Any) -> None:
    """Lets a model attend by the function of this module.

    Raises:
        SettingError: its family has an attention of its own.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise SettingError(
            f"a {model.config.model_type} has an attention of its own ({before}), which does not let a cache choose "
            "among tokens; leave budget and merge out of the cache's recipe"
        ) from error
    if model.config._attn_implementation != NAME:
        raise SettingError(
            f"a {model.config.model_type} attends by {before} alone, which does not let a cache choose among tokens; "
            "leave budget and merge out of the cache's recipe"
        )


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers asks of an attention function; and the layer behind the keys sees the queries.

    Args:
        query: (B, H, Q, D); key, value: (B, K, T, D), the new tokens last.
        attention_mask: bool (B, 1, Q, T of the whole text); None: causal.
        rest: of a family: softcap, sinks, position bias; dropout.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mark: Mark | None = getattr(key, MARK, None)
    if mark is None:
        return _attended(module, query, key, value, attention_mask, scaling, rest)
    if not mark.window:
        return _coded(module, mark.layer, query, attention_mask, scaling, rest), None
    mask = attention_mask if mark.held_BKT is None else uneven(attention_mask, mark.held_BKT, mark.window, query)
    found = _attended(module, query, key, value, mask, scaling, rest)
    layer = mark.layer
    if layer.chooser is not None:
        batch, _, new, size = query.shape
        asked = Asked(
            query.reshape(batch, key.shape[1], -1, new, size),
            _starts(attention_mask, batch, layer),
            scaling,
            rest.get("softcap") or 0.0,
        )
        layer.chooser.saw(layer, asked, one=new == 1)
    return found


def _coded(module: Any, layer: Any, query: Tensor, mask: Tensor | None, scaling: float, rest: dict[str, Any]) -> Tensor:
    """Attention over what a layer holds, whose new tokens are in it and not yet sealed."""
    found = None
    if not rest.get("output_attentions") and rest.get("s_aux") is None:
        found = attended(layer, query, mask, scaling, rest.get("softcap") or 0.0)
    if found is None:
        keys, values = layer.read()
        found = _attended(module, query, keys, values, mask, scaling, rest)[0]
    layer.settle()
    return found


def uneven(mask: Tensor | None, held_BKT: Tensor, window: int, query: Tensor) -> Tensor:
    """(B, H, Q, T), bool: the rows that each head's queries see: older ones all, and of the window what the text's mask
    shows."""
    (batch, heads, new, _), rows = query.shape, held_BKT.shape[2]
    if mask is None:
        seen_BHQT = causal(new, rows, query.device).expand(batch, 1, new, rows)
    else:
        older = torch.ones(batch, 1, new, rows - window, dtype=torch.bool, device=query.device)
        seen_BHQT = torch.cat((older, shown(mask)[..., -window:].expand(batch, 1, new, window)), -1)
    held_BHT = held_BKT.to(query.device).repeat_interleave(heads // held_BKT.shape[1], 1)
    return seen_BHQT & held_BHT.unsqueeze(2)


def _attended(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, rest: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    if any(rest.get(name) is not None for name in EXACT) or rest.get("output_attentions"):
        return exact(query, key, value, mask, scaling, rest.get("softcap"), rest.get("s_aux"))
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, scaling=scaling, **{k: v for k, v in rest.items() if k not in EXACT}
    )
    return found


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output (B, Q, H, D), probabilities (B, H, Q, T)) step by step, in float32, as transformers' eager functions do.

    Args:
        mask: bool, True where a query sees; None: causal.
        sinks_H: a product of each head that takes its share of the probability and gives nothing.
    """
    p_BHQT = probabilities(query, key, mask, scaling, softcap or 0.0, sinks_H)
    out_BHQD = p_BHQT @ repeat_kv(value, query.shape[1] // key.shape[1])
    return out_BHQD.transpose(1, 2).contiguous(), p_BHQT


def _starts(mask: Tensor | None, batch: int, layer: Any) -> Tensor:
    """(B,): the first token of each sequence that counts, by what the newest one sees."""
    if mask is None:
        before = layer.beside.get("starts")
        return torch.zeros(batch, dtype=torch.int64, device="cpu") if before is None else before
    return first_seen(mask).expand(batch).cpu()


def watch(cache: Any, plan: CachePlan, model: Any) -> None:
    """Gives every layer of a new cache its block's policy.

    Raises:
        SettingError: tokens of a block are to be let go and to be shared with another block's.
        BudgetError: a budget in tokens cannot hold what it must.
    """
    numbers = [number for number, block in enumerate(plan.blocks) if block is not None and block.policy is not None]
    rotary = rotary_of(model) if numbers else None
    for place, number in enumerate(numbers):
        block, layer = plan.blocks[number], cache.layers[number]
        assert block is not None
        policy, scheme = block.policy, block.scheme
        assert policy is not None
        if block.merge is not None:
            raise SettingError(
                f"{plan.name} lets tokens of block {number} go and shares what it keeps with another, which keeps "
                "other tokens; leave budget or merge out"
            )
        if policy.score.turns and rotary is None:
            raise SettingError(
                f"how a {model.config.model_type} turns its queries is not known, and {plan.name} undoes it; take a "
                "score that reads attention"
            )
        if policy.budget.keep > 1:
            at = policy.trigger.tokens if policy.trigger.kind == "at" else 0
            check_tokens(int(policy.budget.keep), scheme.window, policy.score.sinks, scheme.tokens, at)
        layer.chooser = Chooser(policy, Layer(place, len(numbers), scheme.tokens), rotary)
        layer.chooser.begin(layer)
    for number, block in enumerate(plan.blocks):
        if block is not None and block.merge is not None:
            _share(cache, plan, block.merge, number)


def _share(cache: Any, plan: CachePlan, merge: Any, number: int) -> None:
    """Lets the deeper one of two layers merge both, where the rule is of both."""
    for shallow, deep in merge.pairs(len(plan.blocks)):
        before, block = plan.blocks[shallow], plan.blocks[deep]
        if deep != number or before is None or block is None or before.merge != merge:
            continue
        if before.scheme != block.scheme or block.scheme.balance:
            raise SettingError(
                f"{plan.name} shares what blocks {shallow} and {deep} keep, which is in one format for both, and not "
                "balanced; write one rule for all blocks, without balance"
            )
        layer = cache.layers[deep]
        layer.chooser = Sharer(merge, cache.layers[shallow])
        layer.chooser.begin(layer)


def rotary_of(model: Any) -> Rotary | None:
    """How the blocks that look back all the way turn their queries; None where the family table does not say."""
    rotary = table_for(model.config).rotary
    if rotary is None:
        return Rotary()
    if rotary.at is None:
        return None
    try:
        module = model.get_submodule(f"{body_prefix(model)}{rotary.at}")
    except AttributeError:
        return Rotary()
    found = dict(module.named_buffers())
    radians = found.get("full_attention_inv_freq", found.get("inv_freq"))
    return None if radians is None else Rotary(tuple(radians.double().tolist()), rotary.pairing == "half")


def expect(cache: Any, tokens: int) -> None:
    """A prompt is about to be read into a cache, after which the text has so many tokens: those are chosen from then,
    in however many pieces it comes."""
    for layer in _watched(cache):
        layer.chooser.expect(layer, tokens)


def watching(cache: Any, new: int) -> bool:
    """Whether attention over the next tokens must be seen, and so computed by transformers' modules."""
    return any(layer.chooser.wants(layer, new) for layer in _watched(cache))


def _watched(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if getattr(layer, "chooser", None) is not None]
