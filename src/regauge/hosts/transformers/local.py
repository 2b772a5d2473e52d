"""A layer of transformers' cache some of whose heads keep a window and the first tokens of the text, and no more.

The other heads keep everything. Which tokens are the first is told by the mask, which transformers gives to attention
and not to the cache: so a layer hands on what is new, and attention asks it for what its heads read (`reads`).

Legend: B sequences, K KV heads (L that keep everything, S that do not), Q new tokens, T tokens of the text, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from regauge.attention.base import Local
from regauge.attention.maps import causal, first_seen, shown
from regauge.errors import ModelError
from regauge.hosts.transformers.cache import OwnLayer
from regauge.runtime.matrices.modules import Made
from regauge.runtime.store.growing import Growing, Sliding

LAYER, LOCAL = "regauge_local_layer", "regauge_local"
"""Attributes: of the keys that a layer returns, the layer; of a module, its (`Local`, number of KV heads)."""
CHUNK = 256
"""Queries of a prompt that are attended to together, behind a window."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query, keys, values, mask) -> (B, Q, H, D)."""


class LocalLayer(OwnLayer):
    """Two stores: of the heads that keep everything, and of those that keep a window, with the first tokens beside it.

    Attributes:
        whole, near: numbers of the heads of either.
        long, window: their stores; empty where there are no such heads.
        sinks: (B, S, sinks, D) of keys and of values, or None; a row is written when its token comes.
    """

    def __init__(self, local: Local, kv_heads: int) -> None:
        super().__init__()
        self.local, self.near = local, list(local.numbers(kv_heads))
        self.whole = [head for head in range(kv_heads) if head not in self.near]
        self._empty()

    def _empty(self) -> None:
        self.long, self.window = Growing(), Sliding(self.local.tokens)
        self.sinks: tuple[Tensor, Tensor] | None = None
        self._new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes (B, K, Q, D) of new tokens, which `reads` puts away, and gives them back."""
        if self._new is not None:
            raise ModelError(
                "attention of a block whose heads keep a window was computed by another function than the model was "
                "loaded with: leave its attn_implementation as it is"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = key_states, value_states
        key_states = key_states.view_as(key_states)
        setattr(key_states, LAYER, self)
        return key_states, value_states

    def reads(self, starts: Sequence[int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """Puts the new tokens away, and gives what heads read: (keys, values) (B, L, T, D) of those that keep
        everything, and (keys, values) (B, S, R, D) of the others with the place of each row (B, R), -1 for none.

        Args:
            starts: the first token of each sequence that counts.
        """
        assert self._new is not None, "there are new tokens"
        (keys, values), self._new = self._new, None
        before, new = self.length, keys.shape[2]
        kept = self.long.append(keys[:, self.whole], values[:, self.whole])
        short = keys[:, self.near], values[:, self.near]
        seen = self.window.append(*short)
        self.length = before + new
        device = keys.device
        at_R = torch.arange(self.length - seen[0].shape[2], self.length, dtype=torch.int64, device=device)
        at_BR = at_R.expand(len(starts), -1)
        if not self.local.sinks:
            return kept, (*seen, at_BR)
        held = self._note(short, before, starts)
        first_B1 = torch.tensor(list(starts), dtype=torch.int64, device=device)[:, None]
        at_BS = first_B1 + torch.arange(self.local.sinks, dtype=torch.int64, device=device)
        at_BS = at_BS.masked_fill(at_BS >= int(at_R[0]), -1)  # what the window still shows is read there
        both = (torch.cat(pair, 2) for pair in zip(held, seen, strict=True))
        return kept, (next(both), next(both), torch.cat((at_BS, at_BR), 1))

    def _note(self, new: tuple[Tensor, Tensor], before: int, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The first tokens of the text, after those of them that are new were taken in."""
        if self.sinks is None:
            shape = [(*one.shape[:2], self.local.sinks, one.shape[3]) for one in new]
            with torch.inference_mode(False):  # memory that may be written outside of inference mode too
                self.sinks = new[0].new_zeros(shape[0]), new[1].new_zeros(shape[1])
        count = new[0].shape[2]
        for sequence, start in enumerate(starts):
            low, high = max(before, start), min(before + count, start + self.local.sinks)
            if low < high:
                for held, one in zip(self.sinks, new, strict=True):
                    held[sequence, :, low - start : high - start] = one[sequence, :, low - before : high - before]
        return self.sinks

    @property
    def stores(self) -> tuple[Growing, ...]:
        """Those that hold something."""
        return tuple(store for store in (self.long, self.window) if store.keys_BHTD is not None)

    @property
    def keys(self) -> Tensor | None:
        """(rows, D) of all that is held, of every head: for whoever counts bytes."""
        return self._held(0)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        _none(tensor)

    @property
    def values(self) -> Tensor | None:
        return self._held(1)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        _none(tensor)

    def _held(self, which: int) -> Tensor | None:
        if not self.length:
            return None
        held = [store.memory[which][:, :, : store.rows] for store in self.stores]
        held += [] if self.sinks is None else [self.sinks[which]]
        return torch.cat([one.reshape(-1, one.shape[-1]) for one in held])

    @property
    def bytes(self) -> int:
        """Of the memory, its room included."""
        sinks = () if self.sinks is None else self.sinks
        return sum(store.bytes for store in self.stores) + sum(one.nbytes for one in sinks)

    def activate_past_recording(self) -> None:
        """Until the next `crop` everything from here on can be taken back."""
        self.window.record()

    def keep(self, length: int) -> None:
        """Takes the last tokens back.

        Raises:
            ValueError: there were never so many.
            RuntimeError: the window would then show what is held no more.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"a store of {self.length} tokens cannot go back to {length}")
        self.window.keep(length)
        self.long.keep(length)
        self.length = length

    def reorder(self, index_B: Tensor) -> None:
        """The sequences in another order, some of them several times or not at all."""
        for store in self.stores:
            store.reorder(index_B)
        if self.sinks is not None:
            self.sinks = self.sinks[0].index_select(0, index_B), self.sinks[1].index_select(0, index_B)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        if self.length:
            batch = self.stores[0].memory[0].shape[0]
            self.reorder(torch.arange(batch, dtype=torch.int64, device="cpu").repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._empty()


def _none(tensor: Tensor | None) -> None:
    if tensor is not None:
        raise ModelError("keys and values of heads that keep a window cannot be set; build the cache with `update`")


def localise(module: Any, local: Local, kv_heads: int) -> None:
    """Lets an attention module keep no more of the past than its heads see, in transformers' dynamic cache."""
    setattr(module, LOCAL, (local, kv_heads))
    module.__class__ = _keeping(module.__class__)


@cache
def _keeping(old: Hashable) -> type:
    """A class of attention that puts its layer into the cache before it attends."""
    assert isinstance(old, type), "a class"
    plain: Callable[..., Any] = old.forward  # type: ignore[attr-defined]  # a module

    def forward(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        _adopt(past_key_values, self)
        return plain(self, *args, past_key_values=past_key_values, **kwargs)

    return Made(old.__name__, (old,), {"forward": forward, "made": (_keeping, old), "__module__": old.__module__})


def _adopt(cache: Any, module: Any) -> None:
    if type(cache) is not DynamicCache or cache.offloading:
        return
    layers, number = cache.layers, module.layer_idx
    layers += [DynamicLayer() for _ in range(number + 1 - len(layers))]
    if type(layers[number]) is DynamicLayer and not layers[number].is_initialized:
        layers[number] = LocalLayer(*getattr(module, LOCAL))


def banded(query: Tensor, keys: Tensor, values: Tensor, local: Local, attend: Attend) -> Tensor:
    """(B, Q, H, D) of heads that all see a window, over a text without padding: `CHUNK` queries at a time read what
    their windows and the sinks show, and no mask of queries times keys is made.

    Args:
        query: (B, H, Q, D), of the last Q of the tokens that keys and values (B, K, T, D) hold.
    """
    (new, tokens), device = (query.shape[2], keys.shape[2]), query.device
    found = []
    for start in range(0, new, CHUNK):
        stop = min(start + CHUNK, new)
        own_C1 = tokens - new + torch.arange(start, stop, dtype=torch.int64, device=device)[:, None]
        first, last = max(0, tokens - new + start - local.tokens + 1), tokens - new + stop
        sinks = min(local.sinks, first)
        at_R = torch.arange(first, last, dtype=torch.int64, device=device)
        at_R = torch.cat((torch.arange(sinks, dtype=torch.int64, device=device), at_R))
        seen_CR = (at_R <= own_C1) & ((at_R > own_C1 - local.tokens) | (at_R < local.sinks))
        read = (torch.cat((one[:, :, :sinks], one[:, :, first:last]), 2) for one in (keys, values))
        found.append(attend(query[:, :, start:stop], next(read), next(read), seen_CR[None, None]))
    return torch.cat(found, 1)


def prompted(local: Local, query: Tensor, keys: Tensor, values: Tensor, attend: Attend) -> Tensor | None:
    """(B, Q, H, D) of a whole text without padding, by `banded` where a head sees a window; None: it is too short to
    gain by that."""
    heads, tokens, kv_heads = query.shape[1], keys.shape[2], keys.shape[1]
    if query.shape[2] != tokens or tokens < 2 * (local.tokens + CHUNK):
        return None
    near, group = set(local.numbers(kv_heads)), heads // kv_heads
    out_BHQD = query.new_empty(*query.shape[:3], values.shape[-1])
    for some in (sorted(near), [head for head in range(kv_heads) if head not in near]):
        if some:
            own = _queries(some, group)
            read = query[:, own], keys[:, some], values[:, some]
            found = banded(*read, local, attend) if some[0] in near else attend(*read, None)
            out_BHQD[:, own] = found.transpose(1, 2)
    return out_BHQD.transpose(1, 2).contiguous()


def _queries(numbers: Sequence[int], group: int) -> list[int]:
    """The query heads that read some KV heads."""
    return [number * group + head for number in numbers for head in range(group)]


def attended(layer: LocalLayer, query: Tensor, mask: Tensor | None, attend: Attend) -> Tensor | None:
    """(B, Q, H, D) of new tokens behind others; None of the first ones, which see nothing but themselves: they are put
    away, and attended to as they came.

    Args:
        mask: of the text, (B, 1, Q, T or more); None: causal.
    """
    (batch, heads, new, _), first = query.shape, layer.length == 0
    starts = [0] * batch if mask is None else first_seen(mask).expand(batch).tolist()
    (keys, values), (near_keys, near_values, at_BR) = layer.reads(starts)
    if first:
        return None
    tokens, device = layer.length, query.device
    seen_BQT = (causal(new, tokens, device)[None] if mask is None else shown(mask)[:, 0, :, :tokens]).expand(
        batch, new, tokens
    )
    own_Q1 = tokens - new + torch.arange(new, dtype=torch.int64, device=device)[:, None]
    at_B1R = at_BR.unsqueeze(1)
    start_B11 = torch.tensor(starts, dtype=torch.int64, device=device).view(-1, 1, 1)
    near_BQR = (at_B1R > own_Q1 - layer.local.tokens) | (at_B1R < start_B11 + layer.local.sinks)
    near_BQR &= (at_B1R >= 0) & seen_BQT.gather(2, at_B1R.clamp(min=0).expand(batch, new, -1))
    group = heads // (len(layer.whole) + len(layer.near))
    out_BHQD = query.new_empty(batch, heads, new, values.shape[-1])
    for numbers, pair, seen in (
        (layer.whole, (keys, values), None if mask is None and new == 1 else seen_BQT.unsqueeze(1)),
        (layer.near, (near_keys, near_values), near_BQR.unsqueeze(1)),
    ):
        if numbers:
            own = _queries(numbers, group)
            out_BHQD[:, own] = attend(query[:, own], *pair, seen).transpose(1, 2)
    return out_BHQD.transpose(1, 2).contiguous()
