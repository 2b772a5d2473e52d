"""What the layers of a dynamic cache hold: keys and values as they are, or decoded from a packed store's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from regauge.cache.scheme import Scheme
from regauge.errors import SettingError
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer
from regauge.hosts.transformers.packed import PackedCache, PackedLayer


@dataclass(frozen=True, eq=False)
class Held:
    """One layer.

    Attributes:
        keys, values: (B, H, T, D) of the last tokens.
        length: tokens seen; origin: the first that is held.
        window: tokens that attention looks back; 0 for all.
        recording: whether everything is kept until the next crop.
        scheme: of a packed store; None: everything is held as it came.
    """

    keys: Tensor
    values: Tensor
    length: int
    origin: int
    window: int = 0
    recording: bool = False
    scheme: Scheme | None = None

    def layer(self, origin: int, tokens: int) -> GrowingLayer:
        """An empty layer of the same kind, that begins with token `origin` and has room for so many."""
        made = SlidingLayer(self.window) if self.window else GrowingLayer()
        if self.scheme is not None:
            made = PackedLayer(self.scheme)
            made.hold()
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
        if isinstance(made, PackedLayer):
            made.release()
            if self.recording:
                made.record()


def read_layers(cache: Any) -> list[Held]:
    """What each layer of a cache holds.

    Raises:
        SettingError: the cache is of another kind, or empty.
    """
    kinds, dynamic = {type(layer) for layer in getattr(cache, "layers", ())} - set(_READ), (DynamicCache, PackedCache)
    if type(cache) not in dynamic or kinds:
        what = type(cache) if type(cache) not in dynamic else kinds.pop()
        raise SettingError(
            f"a {what.__name__} cannot be read: only a DynamicCache whose layers keep keys and values as they are can"
        )
    found = [_READ[type(layer)](layer) for layer in cache.layers if layer.is_initialized]
    if not found or not found[0].length:
        raise SettingError("the cache is empty: give it to the model with the text first")
    return found


def held_of(cache: Any, ids_BT: Tensor, sizes: Sequence[tuple[int, int]], approximate: bool = False) -> list[Held]:
    """What each layer of a cache holds, of a text that is to be edited.

    Args:
        ids_BT: the text whose first tokens the cache holds.
        sizes: (H, D) of each layer's keys.
        approximate: what is held in codes may be decoded.

    Raises:
        SettingError: the cache is of another kind, of another model, empty, or not of this text; or it holds codes, and
            nobody asked for an approximation.
    """
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if isinstance(layer, PackedLayer):
            _check_packed(layer, number, approximate)
    found = read_layers(cache)
    if [(held.keys.shape[1], held.keys.shape[3]) for held in found] != list(sizes):
        raise SettingError("the cache is of another model: its layers have other numbers of heads or channels")
    batch, length = ids_BT.shape
    if any(held.length != found[0].length or len(held.keys) != batch for held in found) or found[0].length > length:
        raise SettingError(
            f"the cache holds {len(found[0].keys)} x {found[0].length} tokens, which are not the first of ids of shape "
            f"{[batch, length]}"
        )
    return found


def empty_like(cache: Any, config: Any) -> Any:
    """A cache of the same kind that holds nothing."""
    return PackedCache(cache.plan, config) if type(cache) is PackedCache else DynamicCache(config=config)


def _check_packed(layer: PackedLayer, number: int, approximate: bool) -> None:
    if layer.chosen or layer.beside:
        raise SettingError(
            f"layer {number} keeps only some of the tokens, so the text cannot be edited in it; let the model read the "
            "edited text"
        )
    if not (approximate or layer.scheme.whole):
        raise SettingError(
            f"layer {number} holds keys in codes, which do not turn without being rounded again; approximate=True "
            "decodes, turns and rounds them, or let the model read the edited text"
        )


def _dynamic(layer: Any) -> Held:
    return Held(layer.keys, layer.values, layer.keys.shape[2], 0)


def _window(layer: Any) -> Held:
    length, rows = layer.cumulative_length, layer.keys.shape[2]
    return Held(layer.keys, layer.values, length, length - rows, layer.sliding_window, layer.record_past)


def _growing(layer: Any) -> Held:
    return Held(layer.keys, layer.values, layer.length, layer.origin)


def _sliding(layer: Any) -> Held:
    return Held(layer.keys, layer.values, layer.length, layer.origin, layer.sliding_window, layer.record_past)


def _packed(layer: Any) -> Held:
    keys, values = layer.read()
    return Held(keys, values, layer.length, 0, recording=layer.record_past, scheme=layer.scheme)


_READ = {
    DynamicLayer: _dynamic,
    DynamicSlidingWindowLayer: _window,
    GrowingLayer: _growing,
    SlidingLayer: _sliding,
    PackedLayer: _packed,
}
