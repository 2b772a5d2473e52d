"""A layer of transformers' cache that keeps values and no keys: of a block that takes another's attention map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from regauge.errors import SettingError


class ValuesLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys have no channels, so every operation of the library's own layer does what it should."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = value_states.dtype, value_states.device
        self.keys = key_states[..., :0, :]
        self.values = value_states[..., :0, :]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.values.shape[-2] if self.is_initialized else 0


def values_only(cache: Any, value_BKTE: Tensor, layer: int) -> Tensor:
    """All values of a layer, the new ones last, after they were kept.

    Raises:
        SettingError: the cache has a layer there that keeps no values alone.
    """
    layers = cache.layers
    while len(layers) < layer + 1 and cache.layer_class_to_replicate is DynamicLayer:
        layers.append(DynamicLayer())
    if len(layers) <= layer or not isinstance(layers[layer], DynamicLayer):
        raise SettingError(
            f"block {layer} takes another's attention map and keeps values only, which a {type(cache).__name__} does "
            "not: load it without cache=, or leave the cache to generate()"
        )
    if type(layers[layer]) is DynamicLayer and not layers[layer].is_initialized:
        layers[layer] = ValuesLayer()
    none = torch.empty((*value_BKTE.shape[:-1], 0), dtype=value_BKTE.dtype, device=value_BKTE.device)
    found: Tensor = cache.update(none, value_BKTE, layer)[1]
    return found
