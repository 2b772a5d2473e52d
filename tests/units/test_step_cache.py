"""The growing layer beside transformers' dynamic one: whatever is done to both, both hold the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from regauge.hosts.transformers.cache import ROOM, GrowingLayer, adopt
from regauge.hosts.transformers.inputs import first_tokens


def tokens(count: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    keys = torch.randn(batch, 3, count, 5, generator=torch.Generator().manual_seed(seed))
    return keys, keys.neg()


def same(ours: GrowingLayer, theirs: DynamicLayer) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length() == ours.length
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    for name in ("keys", "values"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert (one is None) == (other is None)
        assert one is None or one.equal(other)
    for memory in (ours.keys_BHTD, ours.values_BHTD):
        assert memory is None or (memory.is_contiguous() and memory.shape[2] == ours.room >= ours.length)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda layer: layer.crop(-4),
    "crop nothing": lambda layer: layer.crop(0),
    "crop and go on": lambda layer: (layer.crop(-4), layer.update(*tokens(7, seed=2))),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda layer: (layer.batch_repeat_interleave(3), layer.update(*tokens(2, 6, seed=3))),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "select by mask": lambda layer: layer.batch_select_indices(torch.tensor([False, True])),
    "reset": lambda layer: layer.reset(),
    "reset and begin again": lambda layer: (layer.reset(), layer.update(*tokens(3, 1, seed=4))),
    "outgrow its room": lambda layer: [layer.update(*tokens(ROOM - 1, seed=n)) for n in range(5)],
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "copy": lambda layer: None,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_does_what_the_dynamic_layer_does(operation: str) -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    same(ours, theirs)
    for layer in (ours, theirs):
        layer.update(*tokens(11))
    same(ours, theirs)
    for layer in (ours, theirs):
        OPERATIONS[operation](layer)
    same(ours, theirs)
    same(copy.deepcopy(ours), copy.deepcopy(theirs))


def test_what_update_gives_is_all_that_is_held() -> None:
    ours, theirs = GrowingLayer(), DynamicLayer()
    for seed, count in enumerate((5, 1, 300)):
        for one, other in zip(
            ours.update(*tokens(count, seed=seed)), theirs.update(*tokens(count, seed=seed)), strict=True
        ):
            assert one.equal(other)


def test_memory_that_stays_keeps_its_stamp_and_no_two_share_one() -> None:
    layer = GrowingLayer()
    layer.update(*tokens(5))
    stamp = layer.stamp
    layer.update(*tokens(1))
    layer.crop(-2)
    assert layer.stamp == stamp
    copied, memory = copy.deepcopy(layer), layer.keys_BHTD
    assert copied.stamp != stamp
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.stamp not in (stamp, copied.stamp)
    assert layer.keys_BHTD is not memory
    layer.update(*tokens(ROOM * 2))
    assert layer.room >= layer.length == 4 + ROOM * 2


def test_a_dynamic_cache_is_taken_over_and_others_are_left() -> None:
    config = LlamaConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2, vocab_size=11)
    cache = DynamicCache(config=config)
    cache.update(*tokens(4), 0)
    layers = adopt(cache, 3)
    assert layers is not None
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
    assert layers[0].keys is not None
    assert layers[0].keys.equal(tokens(4)[0])
    assert adopt(cache, 3) is layers is cache.layers
    assert adopt(DynamicCache(), 2) is not None
    assert adopt(StaticCache(config=config, max_cache_len=8), 3) is None
    assert adopt(DynamicCache(config=config), 2) is None  # of another model

    class Own(DynamicCache):  # type: ignore[misc]  # transformers is untyped here
        pass

    assert adopt(Own(config=config), 3) is None


@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_layer_behind_a_window_is_taken_over(count: int) -> None:
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    cache.update(*tokens(count), 0)
    layers = adopt(cache, 1)
    assert layers is not None
    assert layers[0].get_seq_length() == count
    assert layers[0].keys is not None
    assert layers[0].keys[:, :, -3:].equal(tokens(count)[0][:, :, -3:])
    assert not layers[0].keys[:, :, :-3].any()
    recording = DynamicCache()
    recording.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    recording.layers[0].activate_past_recording()
    assert adopt(recording, 1) is None


def test_where_padding_ends() -> None:
    one, zero = torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]])
    assert first_tokens(None, 2, 5) == [0, 0]
    assert first_tokens(one, 1, 2) == [0]
    assert first_tokens(torch.tensor([[0, 0, 1]]), 1, 2) == [2]
    assert first_tokens(torch.tensor([[0, 1, 1], [1, 1, 1]]).bool(), 2, 2) == [1, 0]
    for wrong in (zero, torch.tensor([[1, 0, 1]]), torch.tensor([[1, 1, 0]]), torch.ones(1, 4), torch.ones(1, 1, 1, 3)):
        assert first_tokens(wrong, 1, 2) is None
    assert first_tokens({"full_attention": one}, 1, 2) is None
