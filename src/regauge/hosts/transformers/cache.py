"""A cache that transformers and the native step share: each layer's keys and values in one piece of memory with room
to grow, so that a new token is written in place and nothing is copied.

Layers with a sliding window keep every token: the step looks back no further than the window, and transformers' masks
do the same. Legend: B sequences, H KV heads, T tokens, D head size.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256
"""Tokens of room are made in multiples of this."""
_stamps = itertools.count(1)


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' dynamic layer over memory with room.

    Attributes:
        length: tokens held.
        keys_BHTD, values_BHTD: the memory, T with the room.
        room: tokens that the memory holds.
        stamp: the memory's number: no two memories of a process have the same.
    """

    def __init__(self) -> None:
        self.keys_BHTD: Tensor | None = None
        self.values_BHTD: Tensor | None = None
        self.length = self.room = 0
        self.stamp = next(_stamps)
        super().__init__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose memory is another."""
        self.__dict__.update(state)
        self.stamp = next(_stamps)

    @property
    def keys(self) -> Tensor | None:
        """(B, H, T, D) of the tokens held: a view."""
        return None if self.keys_BHTD is None else self.keys_BHTD[:, :, : self.length]

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self.keys_BHTD = None
        elif not _begins(self.keys_BHTD, tensor):
            self._house(keys=_with_room(tensor, tensor.shape[-2]))

    @property
    def values(self) -> Tensor | None:
        """(B, H, T, D) of the tokens held: a view."""
        return None if self.values_BHTD is None else self.values_BHTD[:, :, : self.length]

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self.values_BHTD = None
        elif not _begins(self.values_BHTD, tensor):
            self._house(values=_with_room(tensor, tensor.shape[-2]))
        self.length = 0 if tensor is None else tensor.shape[-2]  # transformers sets keys, then values

    def _house(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Takes new memory."""
        self.keys_BHTD = self.keys_BHTD if keys is None else keys
        self.values_BHTD = self.values_BHTD if values is None else values
        memory = self.keys_BHTD if self.keys_BHTD is not None else self.values_BHTD
        self.room = 0 if memory is None else memory.shape[2]
        self.stamp = next(_stamps)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for what comes first."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T, D) of new tokens, and gives those of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.reserve(new, key_states, value_states)
        assert self.keys_BHTD is not None
        assert self.values_BHTD is not None
        self.keys_BHTD[:, :, self.length : self.length + new] = key_states
        self.values_BHTD[:, :, self.length : self.length + new] = value_states
        self.length += new
        return self.keys_BHTD[:, :, : self.length], self.values_BHTD[:, :, : self.length]

    def reserve(self, new: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Makes room for `new` more tokens; `keys` and `values` tell sizes where nothing is held yet."""
        wanted = self.length + new
        if self.keys_BHTD is None or self.values_BHTD is None:
            assert keys is not None
            assert values is not None
            self._house(_with_room(keys[:, :, :0], wanted), _with_room(values[:, :, :0], wanted))
        elif self.keys_BHTD.shape[2] < wanted:
            grown = max(wanted, self.length * 3 // 2)
            keys_BHTD, values_BHTD = self.keys_BHTD[:, :, : self.length], self.values_BHTD[:, :, : self.length]
            self._house(_with_room(keys_BHTD, grown), _with_room(values_BHTD, grown))

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def reset(self) -> None:
        """Forgets everything."""
        self.keys_BHTD = self.values_BHTD = None
        self.length = self.room = 0
        self.stamp = next(_stamps)
        self.is_initialized = False


def _begins(memory: Tensor | None, tensor: Tensor) -> bool:
    """Whether `tensor` is the first tokens of `memory`, as after a crop."""
    return (
        memory is not None
        and tensor.data_ptr() == memory.data_ptr()
        and tensor.stride() == memory.stride()
        and tensor.shape[:2] == memory.shape[:2]
    )


def _with_room(tensor: Tensor, tokens: int) -> Tensor:
    batch, heads, held, size = tensor.shape
    room = -(-(tokens + ROOM // 2) // ROOM) * ROOM
    with torch.inference_mode(False):  # memory that may be written outside of inference mode too
        memory = torch.empty(batch, heads, room, size, dtype=tensor.dtype, device=tensor.device)
    memory[:, :, :held] = tensor
    return memory


def adopt(cache: Any, blocks: int) -> list[GrowingLayer] | None:
    """The layers of a dynamic cache, made growing ones in place; None where it is a cache of another kind."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    layers = cache.layers
    if layers and type(layers[0]) is GrowingLayer and len(layers) == blocks:
        return layers  # type: ignore[no-any-return]  # transformers' list, all of them ours
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer) for layer in layers):
        return None
    if any(getattr(layer, "record_past", False) for layer in layers) or len(layers) > blocks:
        return None
    layers[:] = [_grown(layer) for layer in layers] + [GrowingLayer() for _ in range(blocks - len(layers))]
    return layers  # type: ignore[no-any-return]  # as above


def _grown(layer: Any) -> GrowingLayer:
    if type(layer) is GrowingLayer:
        return layer
    new, length = GrowingLayer(), layer.get_seq_length()
    if not length:
        return new
    new.lazy_initialization(layer.keys, layer.values)
    held = layer.keys.shape[-2]  # fewer than `length` behind a window, whose older tokens nothing reads again
    memories = []
    for old in (layer.keys, layer.values):
        memory = _with_room(old[:, :, :0], length)
        memory[:, :, : length - held] = 0
        memory[:, :, length - held : length] = old
        memories.append(memory)
    new._house(*memories)
    new.length = length
    return new
