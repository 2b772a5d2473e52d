"""What the layers of a dynamic cache hold, whichever of the kinds that keep keys and values as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from regauge.errors import SettingError
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer


@dataclass(frozen=True, eq=False)
class Held:
    """One layer.

    Attributes:
        keys, values: (B, H, T, D) of the last tokens.
        length: tokens seen; origin: the first that is held.
        window: tokens that attention looks back; 0 for all.
        recording: whether everything is kept until the next crop.
    """

    keys: Tensor
    values: Tensor
    length: int
    origin: int
    window: int = 0
    recording: bool = False

    def layer(self, origin: int, tokens: int) -> GrowingLayer:
        """An empty layer of the same kind, that begins with token `origin` and has room for so many."""
        made = SlidingLayer(self.window) if self.window else GrowingLayer()
        made.lazy_initialization(self.keys, self.values)
        made.length = made.origin = origin
        if isinstance(made, SlidingLayer):
            made.record()
        made.reserve(tokens, self.keys, self.values)
        return made

    def settle(self, made: GrowingLayer) -> None:
        """A layer of `layer` lets go again as this one does."""
        if isinstance(made, SlidingLayer):
            made.keep(made.length)
            made.record_past = self.recording


def held_of(cache: Any, ids_BT: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Held]:
    """What each layer of a cache holds.

    Args:
        ids_BT: the text whose first tokens the cache holds.
        sizes: (H, D) of each layer's keys.

    Raises:
        SettingError: the cache is of another kind, of another model, empty, or not of this text.
    """
    kinds = {type(layer) for layer in getattr(cache, "layers", ())} - set(_READ)
    if type(cache) is not DynamicCache or kinds:
        what = type(cache) if type(cache) is not DynamicCache else kinds.pop()
        raise SettingError(
            f"a {what.__name__} cannot be edited: only a DynamicCache whose layers keep keys and values as they are can"
        )
    found = [_READ[type(layer)](layer) for layer in cache.layers if layer.is_initialized]
    if not found or not found[0].length:
        raise SettingError("the cache is empty: give it to the model with the text first")
    if [(held.keys.shape[1], held.keys.shape[3]) for held in found] != list(sizes):
        raise SettingError("the cache is of another model: its layers have other numbers of heads or channels")
    batch, length = ids_BT.shape
    if any(held.length != found[0].length or len(held.keys) != batch for held in found) or found[0].length > length:
        raise SettingError(
            f"the cache holds {len(found[0].keys)} x {found[0].length} tokens, which are not the first of ids of shape "
            f"{[batch, length]}"
        )
    return found


def _dynamic(layer: Any) -> Held:
    return Held(layer.keys, layer.values, layer.keys.shape[2], 0)


def _window(layer: Any) -> Held:
    length, rows = layer.cumulative_length, layer.keys.shape[2]
    return Held(layer.keys, layer.values, length, length - rows, layer.sliding_window, layer.record_past)


def _growing(layer: Any) -> Held:
    return Held(layer.keys, layer.values, layer.length, layer.origin)


def _sliding(layer: Any) -> Held:
    return Held(layer.keys, layer.values, layer.length, layer.origin, layer.sliding_window, layer.record_past)


_READ = {
    DynamicLayer: _dynamic,
    DynamicSlidingWindowLayer: _window,
    GrowingLayer: _growing,
    SlidingLayer: _sliding,
}
