"""A cache that transformers and the native step share: each layer's keys and values in one piece of memory with room
to grow, so that a new token is written in place and nothing is copied. Layers with a sliding window keep the window,
and a little room: when that is full the window moves to its front, once in some hundred tokens.

Legend: B sequences, H KV heads, T tokens, D head size.
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
        length: tokens seen.
        origin: tokens seen that are held no more: row 0 of the memory is token `origin`.
        keys_BHTD, values_BHTD: the memory, T with the room.
        room: tokens that the memory holds.
        stamp: the number of the memory and of its origin: no two of a process are the same.
    """

    def __init__(self) -> None:
        self.keys_BHTD: Tensor | None = None
        self.values_BHTD: Tensor | None = None
        self.length = self.room = self.origin = 0
        self.stamp = next(_stamps)
        super().__init__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose memory is another."""
        self.__dict__.update(state)
        self.stamp = next(_stamps)

    @property
    def rows(self) -> int:
        """Tokens held."""
        return self.length - self.origin

    @property
    def keys(self) -> Tensor | None:
        """(B, H, T, D) of the tokens held: a view."""
        return None if self.keys_BHTD is None else self.keys_BHTD[:, :, : self.rows]

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self.keys_BHTD = None
        elif not _begins(self.keys_BHTD, tensor):
            self._house(keys=_with_room(tensor, tensor.shape[-2]))

    @property
    def values(self) -> Tensor | None:
        """(B, H, T, D) of the tokens held: a view."""
        return None if self.values_BHTD is None else self.values_BHTD[:, :, : self.rows]

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self.values_BHTD = None
        elif not _begins(self.values_BHTD, tensor):
            self._house(values=_with_room(tensor, tensor.shape[-2]))
        # transformers sets keys, then values
        self.length = 0 if tensor is None else self.origin + tensor.shape[-2]

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
        self.reserve(key_states.shape[-2], key_states, value_states)
        self._write(key_states, value_states)
        assert self.keys_BHTD is not None
        assert self.values_BHTD is not None
        return self.keys_BHTD[:, :, : self.rows], self.values_BHTD[:, :, : self.rows]

    def _write(self, keys: Tensor, values: Tensor) -> None:
        """Behind what is held; there is room."""
        assert self.keys_BHTD is not None
        assert self.values_BHTD is not None
        start, new = self.rows, keys.shape[-2]
        self.keys_BHTD[:, :, start : start + new] = keys
        self.values_BHTD[:, :, start : start + new] = values
        self.length += new

    def reserve(self, new: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Makes room for `new` more tokens; `keys` and `values` tell sizes where nothing is held yet."""
        rows = self.rows
        wanted = rows + new
        if self.keys_BHTD is None or self.values_BHTD is None:
            assert keys is not None
            assert values is not None
            self._house(_with_room(keys[:, :, :0], wanted), _with_room(values[:, :, :0], wanted))
        elif self.room < wanted:
            grown = max(wanted, rows * 3 // 2)
            keys_BHTD, values_BHTD = self.keys_BHTD[:, :, :rows], self.values_BHTD[:, :, :rows]
            self._house(_with_room(keys_BHTD, grown), _with_room(values_BHTD, grown))

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def reset(self) -> None:
        """Forgets everything."""
        self.keys_BHTD = self.values_BHTD = None
        self.length = self.room = self.origin = 0
        self.stamp = next(_stamps)
        self.is_initialized = False


class SlidingLayer(GrowingLayer):
    """A growing layer that lets go of what its window has left behind, as `DynamicSlidingWindowLayer` does.

    Attributes:
        sliding_window: tokens that attention looks back, itself included.
        record_past: nothing is let go until the next `crop`, which settles how much of the text stays.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        self.sliding_window = sliding_window
        self.record_past = False
        self._settled = 0
        super().__init__()

    def activate_past_recording(self) -> None:
        """Until the next `crop` everything from here on can be taken back."""
        self.record_past, self._settled = True, self.length

    def _first(self, seen: int) -> int:
        """The first token that may still be read when `seen` have come."""
        return max(0, (min(self._settled, seen) if self.record_past else seen) - self.sliding_window + 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T, D) of new tokens, and gives theirs and those that the first of them looks back to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, rows, visible = key_states.shape[-2], self.rows, min(self.length, self.sliding_window - 1)
        seen = (key_states, value_states)
        if visible and self.keys_BHTD is not None and self.values_BHTD is not None:
            held = (memory[:, :, rows - visible : rows] for memory in (self.keys_BHTD, self.values_BHTD))
            seen = (torch.cat((next(held), key_states), 2), torch.cat((next(held), value_states), 2))
        skipped = max(0, self._first(self.length + new) - self.length)
        if skipped:  # a long text fills the window by itself
            self.length += skipped
            self.origin, self.stamp = self.length, next(_stamps)
        self.reserve(new - skipped, key_states, value_states)
        self._write(key_states[:, :, skipped:], value_states[:, :, skipped:])
        return seen

    def reserve(self, new: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        """Makes room for `new` more tokens, first by moving the window to the front of its memory."""
        if self.keys_BHTD is not None and self.values_BHTD is not None and self.rows + new > self.room:
            first = max(self._first(self.length), self.origin)
            gone, rows = first - self.origin, self.rows
            if gone:
                for memory in (self.keys_BHTD, self.values_BHTD):
                    memory[:, :, : rows - gone] = memory[:, :, gone:rows].clone()
                self.origin, self.stamp = first, next(_stamps)
        super().reserve(new, keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `update` will give, the first of them)."""
        visible = min(self.length, self.sliding_window - 1)
        return visible + query_length, self.length - visible

    def get_max_length(self) -> int:
        """Tokens that attention looks back."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back (a negative number), and lets go of what the window has left behind.

        Raises:
            ValueError: the number is positive.
            RuntimeError: what the window would then show is held no more.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes tokens away by a negative number, not {tokens_to_remove}.")
        length = self.length + tokens_to_remove
        if self.origin > max(0, length - self.sliding_window + 1):
            raise RuntimeError(
                f"the last {-tokens_to_remove} tokens cannot be taken back from a window of {self.sliding_window} that "
                "has moved on; call `activate_past_recording` before they come."
            )
        self.length = self._settled = length

    def reset(self) -> None:
        """Forgets everything."""
        self._settled = 0
        super().reset()


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
    if layers and type(layers[0]) in OURS and len(layers) == blocks:
        return layers  # type: ignore[no-any-return]  # transformers' list, all of them ours
    if len(layers) > blocks or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, *OURS) for layer in layers
    ):
        return None
    layers[:] = [_grown(layer) for layer in layers] + [GrowingLayer() for _ in range(blocks - len(layers))]
    return layers  # type: ignore[no-any-return]  # as above


def _grown(layer: Any) -> GrowingLayer:
    if type(layer) in OURS:
        return layer  # type: ignore[no-any-return]  # as the line before says
    sliding = type(layer) is DynamicSlidingWindowLayer
    new, length = SlidingLayer(layer.sliding_window) if sliding else GrowingLayer(), layer.get_seq_length()
    if length:
        new.lazy_initialization(layer.keys, layer.values)
        held = layer.keys.shape[-2]  # fewer than `length` behind a window
        new.origin, new.length = length - held, length
        new._house(_with_room(layer.keys, held), _with_room(layer.values, held))
    if isinstance(new, SlidingLayer) and layer.record_past:
        new.activate_past_recording()
    return new


OURS = (GrowingLayer, SlidingLayer)
