"""The attention function of caches that let tokens go: what it computes, what it sees, when tokens go, and which."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from regauge.cache.base import Layer, Seen
from regauge.cache.budgets import AcrossHeads, Tokens, Uniform
from regauge.cache.disposals import Drop
from regauge.cache.scheme import AFTER_PREFILL, BlockCache, CachePlan, Policy, Scheme, Trigger
from regauge.cache.scores import AccumulatedAttention, ExpectedAttention, Random, Recency, WindowAttention
from regauge.errors import BudgetError, SettingError
from regauge.hosts.transformers.attending import NAME, attend, attention, exact, expect, watching
from regauge.hosts.transformers.caching import keep
from regauge.hosts.transformers.packed import cache_of
from regauge.hosts.transformers.table import anatomy_of
from tests.architectures import build

WINDOW, BLOCK = 16, 32
SCORE = WindowAttention(queries=8, pool=1)


class Tilted:
    """A score by which the second head has far more to keep than the first."""

    sinks = queries = 0
    accumulates = turns = False

    def __call__(self, seen: Seen) -> Tensor:
        found = Random()(seen)
        found[:, 1] += 0.5
        return found


@pytest.fixture(scope="module")
def model() -> Any:
    made = build("llama", max_position_embeddings=512)
    attend(made)
    return made


def plan(
    score: Any = SCORE, budget: Any = None, trigger: Trigger | None = None, window: int = WINDOW, **scheme: Any
) -> CachePlan:
    policy = Policy(score, budget or AcrossHeads(0.5, floor=0.0), Drop(), trigger or AFTER_PREFILL)
    return CachePlan("test", (BlockCache(Scheme(window=window, **scheme), policy),) * 2)


def ids(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: Any, cache: Any, new: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(new, past_key_values=cache, **more).logits
    return logits


def counts(cache: Any) -> list[list[list[int]]]:
    return [layer.shelf.counts_BH.tolist() for layer in cache.layers]


def test_it_is_the_models_own_attention_where_nothing_is_let_go(model: Any) -> None:
    text = ids(40, 2)
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    assert torch.equal(read(model, None, text), read(stock, None, text))
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize(("softcap", "sinks"), [(None, None), (5.0, None), (None, True)])
def test_step_by_step_it_is_eager_attention(softcap: float | None, sinks: bool | None) -> None:
    """Against transformers' own eager functions of gemma2 (a cap) and gpt_oss (sinks)."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sunk

    q, k, v = (torch.randn(2, heads, 6, 8, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks = 2, torch.tensor([0.5, -1.0, 2.0, 0.0])  # type: ignore[assignment]
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    way = sunk if sinks else partial(capped, softcap=softcap)
    theirs = way(module, q, k, v, mask, scaling=0.3)
    mine = exact(q, k, v, seen, 0.3, softcap, module.sinks if sinks else None)  # type: ignore[arg-type]
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_after_a_prompt_tokens_go_and_their_memory_with_them(model: Any) -> None:
    text, whole, some = ids(272), cache_of(plan(budget=Uniform(1.0)), model), cache_of(plan(), model)
    for cache in (whole, some):
        expect(cache, 272)
        read(model, cache, text)
    assert whole.layers[0].length == some.layers[0].length == 272
    assert not whole.layers[0].chosen
    assert [sum(row[0]) for row in counts(some)] == [6, 6]  # two heads: (136 - 16) // 32 = 3 blocks each
    full = 2 * 2 * 272 * 10 * 4  # keys and values, two heads of ten channels, float32
    assert some.layers[0].bytes < 0.75 * full < full <= whole.layers[0].bytes


def test_prefill_is_computed_on_everything(model: Any) -> None:
    text, cache = ids(272), cache_of(plan(), model)
    expect(cache, 272)
    assert torch.equal(read(model, cache, text), read(model, None, text))


def test_later_tokens_read_what_was_kept_and_nothing_else(model: Any) -> None:
    """Oracle: the whole text in one forward, where later queries are shown the kept tokens of each head alone."""
    text, cache = ids(272 + 5), cache_of(plan(Tilted()), model)
    expect(cache, 272)
    read(model, cache, text[:, :272])
    found = read(model, cache, text[:, 272:])
    assert len({count for row in counts(cache) for count in row[0]}) > 1  # uneven heads
    kept = [~layer.beside["gone"] for layer in cache.layers]

    def shown(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        see = torch.ones(1, 4, 277, 277, dtype=torch.bool).tril()
        gone = kept[module.layer_idx].repeat_interleave(2, 1)
        see[:, :, 272:, : gone.shape[2]] &= gone.unsqueeze(2)
        return exact(query, key, value, see, scaling)

    from transformers import AttentionInterface

    AttentionInterface.register("shown", shown)
    other = copy.deepcopy(model)
    other.set_attn_implementation("shown")
    assert torch.allclose(found, read(other, None, text)[:, 272:], atol=1e-5)
    assert not torch.allclose(found, read(model, None, text)[:, 272:], atol=1e-3)


@pytest.mark.parametrize("score", [SCORE, AccumulatedAttention(), ExpectedAttention(queries=16), Recency()])
def test_in_whatever_pieces_a_prompt_comes_the_same_tokens_stay(model: Any, score: Any) -> None:
    """Chosen from when the length that was told has been read, or, where none was, at the first single token."""
    text, gone = ids(209), []
    for sizes, told in (
        ([208], True),
        ([96, 96, 16], True),
        ([207, 1], True),
        ([208, 1], False),
        ([96, 112, 1], False),
    ):
        cache, at = cache_of(plan(score), model), 0
        if told:
            expect(cache, 208)
        for size in sizes:
            assert not cache.layers[0].chosen
            read(model, cache, text[:, at : at + size])
            at += size
        assert cache.layers[0].chosen
        gone.append(cache.layers[0].beside["gone"])
    assert torch.equal(gone[0], gone[1])
    assert torch.equal(gone[0], gone[2])
    assert torch.equal(gone[3], gone[4])


def test_padding_on_the_left_is_never_kept_and_never_read(model: Any) -> None:
    """Beside a longer text, a text with two blocks of padding keeps what it keeps alone, and goes on as alone."""
    short, long, new = ids(200), ids(264, seed=5), ids(1, 2, seed=7)
    mask = torch.ones(2, 265, dtype=torch.int64)
    mask[0, :64] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, alone = cache_of(plan(), model), cache_of(plan(), model)
    expect(cache, 264)
    text = torch.cat((torch.cat((torch.zeros(1, 64, dtype=torch.int64), short), 1), long))
    read(model, cache, text, attention_mask=mask[:, :264], position_ids=positions[:, :264])
    expect(alone, 200)
    read(model, alone, short)
    gone = [one.layers[0].beside["gone"] for one in (cache, alone)]
    assert gone[0][0, :, :64].all()
    assert torch.equal(gone[0][0, :, 64:], gone[1][0])
    assert counts(cache)[0][0] == counts(alone)[0][0]
    assert sum(counts(cache)[0][1]) == 2 * ((264 // 2 - 40) // BLOCK)
    both = read(model, cache, new, attention_mask=mask, position_ids=positions[:, -1:])
    assert torch.allclose(both[:1], read(model, alone, new[:1]), atol=1e-5)


def test_nothing_is_let_go_that_a_rollback_may_want(model: Any) -> None:
    text, cache = ids(300), cache_of(plan(), model)
    cache.activate_past_recording()
    expect(cache, 272)
    read(model, cache, text[:, :272])
    assert not cache.layers[0].chosen
    read(model, cache, text[:, 272:277])
    assert not cache.layers[0].chosen  # nothing is settled yet
    cache.crop(-3)
    read(model, cache, text[:, 274:279])
    layer = cache.layers[0]
    assert layer.chosen
    assert layer.rows >= WINDOW + 5  # of 274 that are settled, and five that are not
    cache.crop(-5)
    assert layer.length == 274
    with pytest.raises(RuntimeError, match="cannot be taken back"):
        cache.crop(-100)


def test_every_so_many_tokens_and_at_a_size(model: Any) -> None:
    text = ids(380)
    sizes: dict[str, list[int]] = {"every": [], "at": []}
    for trigger in (Trigger("every", 64), Trigger("at", 160)):
        cache = cache_of(plan(budget=Tokens(112), trigger=trigger, score=SCORE), model)
        expect(cache, 240)
        read(model, cache, text[:, :240])
        for at in range(240, 380):
            read(model, cache, text[:, at : at + 1])
            layer = cache.layers[0]
            sizes[trigger.kind].append(layer.rows + int(layer.shelf.counts_BH.sum()) * BLOCK // 2)
        assert cache.layers[0].beside["gone"].sum() > 2 * (290 - 112)
    assert max(sizes["every"]) <= 112 + 64
    assert max(sizes["at"]) < 160 + BLOCK
    assert min(sizes["at"][50:]) <= 112


def test_the_step_is_told_when_it_must_not_take_a_token(model: Any) -> None:
    text = ids(400)
    cache = cache_of(plan(), model)
    assert watching(cache, 1)
    expect(cache, 240)
    read(model, cache, text[:, :240])
    assert not watching(cache, 1)  # once, and it is done
    cache = cache_of(plan(trigger=Trigger("every", 64)), model)
    expect(cache, 240)
    read(model, cache, text[:, :240])
    assert not watching(cache, 1)
    for layer in cache.layers:  # as if the step had written so many
        layer.length, layer.chooser.pending = 240, False
        assert not layer.chooser.wants(layer, 64 - 8)
        assert layer.chooser.wants(layer, 64 - 7)  # the queries of the last eight are wanted


def test_a_second_prompt_is_chosen_from_anew(model: Any) -> None:
    text, cache = ids(420), cache_of(plan(), model)
    expect(cache, 208)
    read(model, cache, text[:, :208])
    first = cache.layers[0].beside["gone"]
    read(model, cache, text[:, 208:210][:, :1])
    expect(cache, 400)
    read(model, cache, text[:, 209:400])
    layer = cache.layers[0]
    assert int(layer.beside["chosen"][0]) == 400
    second = layer.beside["gone"]
    assert (second[:, :, : first.shape[2]] | ~first).all()  # what went stays gone
    assert second.sum() > first.sum()


def test_sequences_in_another_order_keep_their_own(model: Any) -> None:
    text, cache = ids(272, 2), cache_of(plan(), model)
    expect(cache, 272)
    read(model, cache, text)
    new = ids(1, 2, seed=3)
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.tensor([1, 0]))
    straight, crossed = read(model, cache, new), read(model, other, new.flip(0))
    assert torch.allclose(straight.flip(0), crossed, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"num_return_sequences": 2}])
def test_generate_says_how_long_the_prompt_is(how: dict[str, Any]) -> None:
    """A prompt in pieces, to whose length `generate` owns up, is chosen from once: the same text comes."""
    made = build("llama", max_position_embeddings=512)
    made.generation_config.eos_token_id = None
    keep(made, anatomy_of(made.config, made), plan())
    told: dict[str, Any] = {"max_new_tokens": 40, "do_sample": "num_return_sequences" in how, **how}
    found = []
    for size in (None, 96):
        torch.manual_seed(1)
        batch = 1 if "prompt_lookup_num_tokens" in how else 2
        some = made.generate(
            ids(240, batch), prefill_chunk_size=size, return_dict_in_generate=True, pad_token_id=0, **told
        )
        assert all(layer.chosen for layer in some.past_key_values.layers)
        assert some.sequences.shape[1] == 280
        found.append(some.sequences)
    assert torch.equal(*found)


def test_what_cannot_hold_is_refused_before_any_work(model: Any) -> None:
    with pytest.raises(
        BudgetError, match=r"a budget of 60 tokens a head cannot hold its window of 16.*write 80 or more"
    ):
        cache_of(plan(budget=Tokens(60)), model)
    both = BlockCache(Scheme(window=WINDOW), plan().blocks[0].policy, merge=object())  # type: ignore[union-attr]
    with pytest.raises(SettingError, match="lets tokens of block 0 go and shares what it keeps"):
        cache_of(CachePlan("test", (both, both)), model)


def test_another_attention_is_found_out(model: Any) -> None:
    other, cache = copy.deepcopy(model), cache_of(plan(), model)
    other.set_attn_implementation("sdpa")
    expect(cache, 272)
    read(other, cache, ids(272))
    with pytest.raises(SettingError, match="lets tokens go, or shares them, by what attends to them"):
        read(other, cache, ids(1))


def test_families_with_an_attention_of_their_own_are_refused() -> None:
    for name in ("bloom", "falcon"):
        with pytest.raises(SettingError, match=f"a {name} attends by .* alone.*leave budget and merge out"):
            attend(build(name))


def test_a_layer_counts_among_those_that_choose(model: Any) -> None:
    only = CachePlan("test", (None, plan().blocks[0]))
    cache = cache_of(only, model)
    assert cache.layers[1].chooser.layer == Layer(0, 1, BLOCK)
    expect(cache, 272)
    read(model, cache, ids(272))
    assert cache.layers[1].chosen


def test_the_function_leaves_marks_of_others_alone() -> None:
    q, k, v = (torch.randn(1, heads, 3, 8, generator=torch.Generator().manual_seed(1)) for heads in (4, 2, 2))
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    out, weights = attention(module, q, k, v, None, output_attentions=True)
    assert out.shape == (1, 3, 4, 8)
    assert weights is not None
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 3))
