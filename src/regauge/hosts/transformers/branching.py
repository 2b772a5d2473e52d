"""Several continuations of one cached text, which lies in memory once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import DynamicCache

from regauge.errors import SettingError
from regauge.hosts.transformers.cache import GrowingLayer, OwnLayer
from regauge.hosts.transformers.held import Held, read_layers
from regauge.runtime.store.branched import Branched


class BranchedLayer(Branched, OwnLayer):
    """A branched store as transformers' dynamic layer: a crop does not reach into the prefix."""


def share(cache: Any, sequences: int) -> Any:
    """A cache of several sequences that all go on from what another holds, which lies in memory once.

        cache = model(ids[:, :-1], use_cache=True).past_key_values
        shared = rg.cache.share(cache, 4)
        model.generate(ids, past_key_values=shared, num_return_sequences=4, do_sample=True)

    The native step of `rg.load` reads the prefix where it lies. Where transformers' own modules decode, each layer puts
    it before every sequence for the length of its attention.

    Args:
        cache: a `DynamicCache` of one sequence, which stays as it is and may be let go of.
        sequences: how many go on.

    Returns:
        A `DynamicCache`. It is cropped, reordered and repeated like any other, but not cropped into the prefix, less
        its last tokens up to a block of 32. Layers behind a sliding window hold their window once a sequence.

    Raises:
        SettingError: the cache is of another kind, empty, packed, or of several sequences; or there are none to be.
    """
    if sequences < 1:
        raise SettingError(f"a prefix is shared by one sequence or more, not by {sequences}")
    held = read_layers(cache)
    if any(one.scheme is not None for one in held):
        raise SettingError("a packed cache cannot be shared by sequences; repeat it by cache.batch_repeat_interleave")
    if any(len(one.keys) != 1 for one in held):
        raise SettingError(f"the cache holds {len(held[0].keys)} sequences, and a prefix is one")
    found = DynamicCache()
    found.layers[:] = [_layer(one, sequences) for one in held]
    return found


def _layer(one: Held, sequences: int) -> GrowingLayer:
    if one.window:
        keys, values = (memory.expand(sequences, -1, -1, -1) for memory in (one.keys, one.values))
        repeated = replace(one, keys=keys, values=values)
        window = repeated.layer(one.origin, keys.shape[2])
        window.append(keys, values)
        repeated.settle(window)
        return window
    made = BranchedLayer()
    made.lazy_initialization(one.keys, one.values)
    made.branch(one.keys[0], one.values[0], sequences)
    return made
