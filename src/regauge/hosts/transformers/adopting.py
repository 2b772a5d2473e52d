"""transformers' dynamic caches taken over: their layers become ours, in place, so that the native step writes them."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from regauge.hosts.transformers.branching import BranchedLayer
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer
from regauge.hosts.transformers.packed import PackedCache, PackedLayer


def adopt(cache: Any, blocks: int) -> list[GrowingLayer] | None:
    """The layers of a dynamic cache, made growing ones in place; None where it is a cache of another kind."""
    if type(cache) not in CACHES or cache.offloading:
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
        new.house(new.roomy(layer.keys, held), new.roomy(layer.values, held))
    if isinstance(new, SlidingLayer) and layer.record_past:
        new.activate_past_recording()
    return new


OURS = (GrowingLayer, SlidingLayer, PackedLayer, BranchedLayer)
CACHES = (DynamicCache, PackedCache)
"""Caches whose layers the step may make its own."""
