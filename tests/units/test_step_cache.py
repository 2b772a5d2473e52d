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

from regauge.hosts.transformers.adopting import adopt
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer
from regauge.runtime.step.running import first_tokens
from regauge.runtime.store.growing import ROOM


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


def alike(ours: SlidingLayer, theirs: DynamicSlidingWindowLayer) -> None:
    """Both show the same to what comes next; ours may hold more."""
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_max_length() == theirs.get_max_length()
    assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    shown = min(ours.length, ours.sliding_window - 1)
    assert ours.rows >= shown
    if shown:
        assert ours.keys is not None
        assert ours.keys[:, :, -shown:].equal(theirs.keys[:, :, -shown:])


SLIDING: dict[str, Callable[[Any], Any]] = {
    "token by token": lambda layer: [layer.update(*tokens(1, seed=n)) for n in range(9)],
    "a few at once": lambda layer: [layer.update(*tokens(4, seed=n)) for n in range(3)],
    "a long text": lambda layer: (layer.update(*tokens(700, seed=1)), layer.update(*tokens(1, seed=2))),
    "reorder": lambda layer: (layer.reorder_cache(torch.tensor([1, 1])), layer.update(*tokens(2, seed=3))),
    "repeat": lambda layer: (layer.batch_repeat_interleave(3), layer.update(*tokens(2, 6, seed=3))),
    "take back": lambda layer: (
        layer.activate_past_recording(),
        layer.update(*tokens(4, seed=5)),
        layer.crop(-3),
        layer.update(*tokens(2, seed=6)),
        layer.crop(0),
        layer.update(*tokens(3, seed=7)),
        layer.crop(-1),
    ),
    "reset and begin again": lambda layer: (layer.reset(), layer.update(*tokens(3, 1, seed=4))),
}


@pytest.mark.parametrize("begun", [2, 3, 4, 11])
@pytest.mark.parametrize("operation", SLIDING)
def test_a_sliding_layer_shows_what_transformers_shows(operation: str, begun: int) -> None:
    ours, theirs = SlidingLayer(4), DynamicSlidingWindowLayer(sliding_window=4)
    found = [layer.update(*tokens(begun)) for layer in (ours, theirs)]
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    alike(ours, theirs)
    for layer in (ours, theirs):
        SLIDING[operation](layer)
    alike(ours, theirs)
    found = [layer.update(*tokens(2, ours.keys.shape[0] if ours.keys is not None else 1)) for layer in (ours, theirs)]
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    alike(copy.deepcopy(ours), theirs)


def test_a_long_text_does_not_grow_a_sliding_layer() -> None:
    """Forty times the window: the memory is what it was, and its stamp tells of every move."""
    layer = SlidingLayer(40)
    layer.update(*tokens(50))
    room, moves = layer.room, set()
    for turn in range(1600):
        layer.update(*tokens(1, seed=turn % 7))
        moves.add((layer.stamp, layer.origin))
        assert layer.room == room <= 40 + 2 * ROOM
        assert 39 <= layer.rows <= room
    assert len(moves) == len({stamp for stamp, _ in moves}) > 3
    assert layer.length == 1650


def test_what_a_window_has_left_behind_cannot_come_back() -> None:
    layer = SlidingLayer(4)
    layer.update(*tokens(600))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(1)
    assert layer.length == 600


@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_layer_behind_a_window_is_taken_over(count: int) -> None:
    cache, stock = DynamicCache(), DynamicSlidingWindowLayer(sliding_window=4)
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    cache.update(*tokens(count), 0)
    stock.update(*tokens(count))
    layers = adopt(cache, 1)
    assert layers is not None
    assert isinstance(layers[0], SlidingLayer)
    alike(layers[0], stock)
    recording = DynamicCache()
    recording.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    recording.activate_past_recording()
    recording.update(*tokens(9), 0)
    layers = adopt(recording, 1)
    assert layers is not None
    assert layers[0].rows == 9
    layers[0].crop(-5)
    assert layers[0].keys is not None
    assert layers[0].keys[:, :, -3:].equal(tokens(9)[0][:, :, 1:4])


def test_where_padding_ends() -> None:
    one, zero = torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]])
    assert first_tokens(None, 2, 6) == [0, 0]
    assert first_tokens(one, 1, 3) == [0]
    assert first_tokens(torch.tensor([[0, 0, 1]]), 1, 3) == [2]
    assert first_tokens(torch.tensor([[0, 1, 1], [1, 1, 1]]).bool(), 2, 3) == [1, 0]
    for wrong in (zero, torch.tensor([[1, 0, 1]]), torch.tensor([[1, 1, 0]]), torch.ones(1, 4), torch.ones(1, 1, 1, 3)):
        assert first_tokens(wrong, 1, 3) is None
    assert first_tokens({"full_attention": one}, 1, 3) is None
