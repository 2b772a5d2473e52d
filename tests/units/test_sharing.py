"""Two layers that share what they keep: directions once in memory, lengths of each, retained tokens, whatever order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from regauge.cache.merges import AcrossLayers, in_blocks
from regauge.cache.scheme import AFTER_PREFILL, BlockCache, CachePlan, Policy, Scheme
from regauge.errors import ArtifactError, SettingError
from regauge.hosts.transformers.attending import attend, expect, watching
from regauge.hosts.transformers.packed import cache_of
from regauge.kernels.attention import Window
from regauge.kernels.attention import attend as attended
from regauge.runtime.store.choosing import Asked
from regauge.runtime.store.packed import Packed
from regauge.runtime.store.saving import packed_state
from regauge.runtime.store.sharing import Sharer
from tests.architectures import build
from tests.stores import kivi

WINDOW, BLOCK = 16, 32
MERGE = AcrossLayers(start=0.0)


@pytest.fixture(scope="module")
def model() -> Any:
    made = build("llama", max_position_embeddings=512)
    attend(made)
    return made


def plan(scheme: Scheme | None = None, merge: Any = MERGE) -> CachePlan:
    return CachePlan("test", (BlockCache(scheme or Scheme(window=WINDOW), merge=merge),) * 2)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def ids(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: Any, cache: Any, new: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(new, past_key_values=cache, **more).logits
    return logits


def stores(
    keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], scheme: Scheme | None = None, starts: Any = None
) -> tuple[Packed, Packed]:
    """Two stores that share, of given keys and values."""
    shallow, deep = Packed(scheme or Scheme(window=WINDOW)), Packed(scheme or Scheme(window=WINDOW))
    sharer = Sharer(MERGE, shallow)
    sharer.begin(deep)
    batch, heads, tokens, size = keys[0].shape
    sharer.expect(deep, tokens)
    for store, k, v in zip((shallow, deep), keys, values, strict=True):
        store.append(k, v)
    starts_B = torch.zeros(batch, dtype=torch.int64) if starts is None else torch.tensor(starts)
    sharer.saw(deep, Asked(draw(batch, heads, 1, 1, size), starts_B, 1.0), one=False)
    return shallow, deep


def near(tokens: int = 240, batch: int = 1, by: float = 0.3) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    found = []
    for seed in (1, 5):
        x = draw(batch, 2, tokens, 8, seed=seed)
        found.append((x, 2 * (x + by * draw(batch, 2, tokens, 8, seed=seed + 1) * draw(batch, 1, tokens, 1).abs())))
    return found[0], found[1]


def test_layers_alike_share_without_loss_and_half_of_the_memory() -> None:
    k, v = draw(1, 2, 240, 8), draw(1, 2, 240, 8, seed=1)
    shallow, deep = stores((k, 3 * k), (v, v / 2))
    assert torch.allclose(shallow.read()[0], k, atol=1e-5)
    assert torch.allclose(deep.read()[0], 3 * k, atol=1e-5)
    assert torch.allclose(deep.read()[1], v / 2, atol=1e-5)
    merged = 224  # seven blocks are older than the window
    directions, lengths = (
        2 * merged * 2 * 8 * 4,
        2 * merged * 4,
    )  # two heads of eight; one length for both
    window = [store.keys_BHTD.numel() * 2 * 4 for store in (shallow, deep)]  # type: ignore[union-attr]
    books = 3 * 2 * 8  # counts, starts and rooms of two heads
    assert deep.bytes - window[1] == lengths + books
    assert shallow.bytes - window[0] == directions + lengths + 2 * books


def test_directions_lie_once_in_memory_and_lengths_apart() -> None:
    shallow, deep = stores(*near())
    one, two = shallow.parts()[0], deep.parts()[0]
    assert one.key_blocks.data_ptr() == two.key_blocks.data_ptr()
    assert one.value_blocks.data_ptr() == two.value_blocks.data_ptr()
    assert one.key_rows is not None
    assert two.key_rows is not None
    assert one.key_rows.data_ptr() != two.key_rows.data_ptr()
    assert one.row_offsets_BK is not None
    assert len(set(one.row_offsets_BK[0].tolist())) == 1  # the heads of a token have one length
    both = copy.deepcopy((shallow, deep))
    again = [store.parts()[0] for store in both]
    assert again[0].key_blocks.data_ptr() == again[1].key_blocks.data_ptr() != one.key_blocks.data_ptr()


def test_what_is_read_is_the_merge_and_the_most_distant_as_they_came() -> None:
    keys, values = near()
    shallow, deep = stores(keys, values)
    made = [MERGE(a[:, :, :224], b[:, :, :224]) for a, b in (keys, values)]
    spread = torch.maximum(made[0].spread_BT, made[1].spread_BT)
    apart = in_blocks(spread, made[0].retained_BT | made[1].retained_BT, BLOCK, torch.zeros(1, 224, dtype=torch.bool))
    assert int(apart.sum()) == BLOCK
    assert spread[apart].min() >= spread[~apart].max()
    for number, store in enumerate((shallow, deep)):
        read_keys, read_values = store.read()
        for found, x, merge in ((read_keys, keys, made[0]), (read_values, values, made[1])):
            own = x[number]
            merged = merge.restored()[number][:, :, ~apart[0]]
            wanted = torch.cat((merged, own[:, :, :224][:, :, apart[0]], own[:, :, 224:]), 2)
            assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("scheme", [Scheme(window=WINDOW), kivi(4, window=WINDOW)])
def test_attention_reads_parts_as_a_store_is_read(scheme: Scheme) -> None:
    shallow, deep = stores(*near(batch=2), scheme=scheme, starts=[0, 40])
    for store in (shallow, deep):
        store.append(draw(2, 2, 3, 8, seed=8), draw(2, 2, 3, 8, seed=9))
        q = draw(2, 1, 4, 8, seed=3)
        keys, values = store.read()
        held = store.held
        assert held is not None
        weight = torch.einsum("bqhd,bhtd->bhqt", q, keys.repeat_interleave(2, 1)) * 0.4
        weight = weight.masked_fill(~held.repeat_interleave(2, 1)[:, :, None], -torch.inf)
        by_hand = torch.einsum("bhqt,bhtd->bqhd", weight.softmax(-1), values.repeat_interleave(2, 1))
        window = Window(*(memory[:, :, : store.rows] for memory in store.memory))
        found = attended(q, store.parts([0, 40]), window, 0.4)
        assert torch.allclose(found, by_hand, atol=1e-4)
        assert int((~held[1, 0]).sum()) == 40  # the padding of the second, wherever it lies


def test_a_format_of_directions_is_closer_than_dropping_them() -> None:
    keys, values = near()
    exact, coded = stores(keys, values), stores(keys, values, scheme=kivi(4, window=WINDOW))
    for a, b in zip(exact, coded, strict=True):
        assert 0 < float((a.read()[0] - b.read()[0]).norm() / a.read()[0].norm()) < 0.15
    assert sum(store.bytes for store in coded) < 0.6 * sum(store.bytes for store in exact)


def test_sequences_in_another_order_and_several_times() -> None:
    shallow, deep = stores(*near(batch=2))
    before = [store.read() for store in (shallow, deep)]
    index = torch.tensor([1, 0, 1])
    for store in (shallow, deep):
        store.reorder(index)
    for store, (keys, values) in zip((shallow, deep), before, strict=True):
        assert torch.equal(store.read()[0], keys[index])
        assert torch.equal(store.read()[1], values[index])
    assert shallow.parts()[0].key_blocks.data_ptr() == deep.parts()[0].key_blocks.data_ptr()


def test_in_a_model_later_tokens_read_the_merged_ones(model: Any) -> None:
    """Oracle: transformers' own cache with merged keys and values put in their places."""
    text, cache, stock = ids(245), cache_of(plan(), model), DynamicCache(config=model.config)
    assert watching(cache, 1)
    expect(cache, 240)
    assert torch.equal(read(model, cache, text[:, :240]), read(model, stock, text[:, :240]))
    assert not watching(cache, 1)
    found = read(model, cache, text[:, 240:])
    parts = [getattr(stock.layers[n], role)[:, :, :224] for role in ("keys", "values") for n in (0, 1)]
    made = [MERGE(*parts[:2]), MERGE(*parts[2:])]
    spread = torch.maximum(made[0].spread_BT, made[1].spread_BT)
    apart = in_blocks(spread, made[0].retained_BT | made[1].retained_BT, BLOCK, torch.zeros(1, 224, dtype=torch.bool))
    for role, merge in zip(("keys", "values"), made, strict=True):
        for number, restored in enumerate(merge.restored()):
            held = getattr(stock.layers[number], role)
            held[:, :, :224] = torch.where(apart[:, None, :, None], held[:, :, :224], restored)
    assert torch.allclose(found, read(model, stock, text[:, 240:]), atol=1e-4)


def test_in_pieces_while_recording_and_a_second_prompt(model: Any) -> None:
    text, whole, some = ids(300), cache_of(plan(), model), cache_of(plan(), model)
    for cache, sizes in ((whole, [240]), (some, [100, 100, 40])):
        expect(cache, 240)
        for part in text[:, :240].split(sizes, 1):
            read(model, cache, part)
    for a, b in zip(whole.layers, some.layers, strict=True):
        assert torch.allclose(a.read()[0], b.read()[0], atol=1e-5)
    expect(whole, 300)
    before = whole.layers[1].shelf.common
    read(model, whole, text[:, 240:])
    assert whole.layers[1].shelf.common is before  # merged once
    recorded = cache_of(plan(), model)
    recorded.activate_past_recording()
    expect(recorded, 240)
    read(model, recorded, text[:, :240])
    assert not recorded.layers[1].chosen
    recorded.crop(0)
    read(model, recorded, text[:, 240:244])
    assert recorded.layers[0].chosen
    recorded.crop(-4)
    assert recorded.layers[0].length == recorded.layers[1].length == 240


def test_what_is_refused(model: Any) -> None:
    policy = Policy(None, None, None, AFTER_PREFILL)
    both = BlockCache(Scheme(window=WINDOW), policy, MERGE)
    with pytest.raises(SettingError, match="lets tokens of block 0 go and shares what it keeps"):
        cache_of(CachePlan("test", (both, both)), model)
    uneven = (BlockCache(Scheme(window=WINDOW), merge=MERGE), BlockCache(Scheme(window=8), merge=MERGE))
    with pytest.raises(SettingError, match="which is in one format for both"):
        cache_of(CachePlan("test", uneven), model)
    _, deep = stores(*near())
    with pytest.raises(ArtifactError, match="a cache whose layers share what they keep is not saved"):
        packed_state(deep)


def test_a_rule_of_one_block_alone_shares_nothing(model: Any) -> None:
    alone = cache_of(CachePlan("test", (None, BlockCache(Scheme(window=WINDOW), merge=MERGE))), model)
    assert not watching(alone, 1)
