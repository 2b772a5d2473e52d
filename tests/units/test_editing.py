"""Edits of a cached text: what moves is what the model itself would compute there from the same states."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import regauge as rg
from architectures import build
from pico import pico
from regauge.errors import ModelError, SettingError
from regauge.hosts.transformers import moving
from regauge.hosts.transformers.adopting import adopt
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer
from regauge.hosts.transformers.packed import cache_of
from regauge.runtime.store.rotate import turn, turning
from stores import kivi, plan_of

EDITS = [(2, 1, [5, 9, 11]), (7, 4), (15, 0, [3])]
"""Of a text of 23: a replacement, a deletion and an insertion: later tokens move by 2, then by -2, then by -1."""
KEPT = [(0, 2, 0), (3, 7, 5), (11, 15, 9), (15, 23, 14)]
"""(start, stop) of the old text, and where it stands in the new."""
NEW = 22


def text(model: Any, tokens: int = 23, batch: int = 1, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=draw)


def cached(model: Any, ids: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=True, **options).past_key_values


class Seen:
    """A module's function for rotary embeddings, that remembers the keys it was given, and how it was called."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, list[Any]()

    def __call__(self, q: Any, k: Any, *tables: Any, **options: Any) -> Any:
        self.calls.append((k, options))
        return self.function(q, k, *tables, **options)


FAMILIES = {
    "llama": lambda: pico("llama", dtype=torch.float64),
    "gpt_neox": lambda: pico("gpt_neox", dtype=torch.float64),  # a part of a head turns
    "gemma3": lambda: pico("gemma3", dtype=torch.float64, sliding_window=40),  # two kinds
    "yarn": lambda: build("llama-yarn-rope", dtype=torch.float64),  # a factor on cosines and sines
    "glm": lambda: build("glm", dtype=torch.float64),  # pairs are neighbours
    "cohere": lambda: build("cohere", dtype=torch.float64),  # and so are their numbers in the tables
}


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_keys_are_what_the_model_makes_of_the_same_states_at_their_new_positions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES[family]()
    code, ids, places = sys.modules[type(model).__module__], text(model), torch.arange(NEW).unsqueeze(0)
    seen = Seen(code.apply_rotary_pos_emb)
    monkeypatch.setattr(code, "apply_rotary_pos_emb", seen)
    cache = cached(model, ids)
    monkeypatch.undo()
    edited = rg.cache.edit(model, cache, ids, EDITS)
    parts = [ids[0, :2], [5, 9, 11], ids[0, 3:7], ids[0, 11:15], [3], ids[0, 15:]]
    assert edited.ids.tolist() == [[int(token) for part in parts for token in part]]
    assert edited.cache.get_seq_length() == NEW - 1  # the last is left for `generate` to read
    rotary, kinds = model.get_decoder().rotary_emb, getattr(model.config, "layer_types", None)
    for number, (layer, (raw, options)) in enumerate(zip(edited.cache.layers, seen.calls, strict=True)):
        tables = rotary(raw, places, kinds[number]) if family == "gemma3" else rotary(raw, places)
        for start, stop, at in KEPT:
            count = min(stop - start, NEW - 1 - at)
            some, there = slice(start, start + count), slice(at, at + count)
            length = tables[0].shape[-1]
            if family == "gpt_neox":
                raw = raw[..., :length]
            now = tuple(table[:, there] for table in tables)
            _, wanted = seen.function(raw[:, :, some], raw[:, :, some], *now, **options)
            found = layer.keys[:, :, there, : wanted.shape[-1]]
            assert float((found - wanted).abs().max()) < 1e-13 * float(wanted.abs().max())
            assert layer.keys[:, :, there, wanted.shape[-1] :].equal(
                cache.layers[number].keys[:, :, some, wanted.shape[-1] :]
            )
            assert layer.values[:, :, there].equal(cache.layers[number].values[:, :, some])


def test_what_is_new_is_read_over_the_text_before_it() -> None:
    model = pico("llama", dtype=torch.float64)
    ids = text(model)
    edited = rg.cache.edit(model, cached(model, ids), ids, EDITS)
    before = DynamicCache(config=model.config)
    for number, layer in enumerate(edited.cache.layers):
        before.update(layer.keys[:, :, :13], layer.values[:, :, :13], number)
    after = cached(model, edited.ids[:, 13:14], past_key_values=before)
    for ours, theirs in zip(edited.cache.layers, after.layers, strict=True):
        assert torch.allclose(ours.keys[:, :, 13], theirs.keys[:, :, 13], rtol=0, atol=1e-12)
        assert torch.allclose(ours.values[:, :, 13], theirs.values[:, :, 13], rtol=0, atol=1e-12)


def test_an_edit_where_nothing_follows_is_exact_and_generate_goes_on_from_it() -> None:
    model = pico("llama", dtype=torch.float64)
    ids = text(model)
    edited = rg.cache.edit(model, cached(model, ids), ids, [(20, 3, [7, 8])])
    assert edited.cache.get_seq_length() == 20  # what is inserted behind the last kept token is left for `generate`
    options = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(edited.ids, past_key_values=edited.cache, **options).equal(
        model.generate(torch.cat((ids[:, :20], torch.tensor([[7, 8]])), 1), **options)
    )


def test_a_cache_of_a_part_of_the_text_and_one_that_is_edited_away() -> None:
    model = pico("llama")
    ids = text(model)
    cache = cached(model, ids[:, :10])
    edited = rg.cache.edit(model, cache, ids, [(3, 2), (12, 0, [1, 2])])
    assert edited.cache.get_seq_length() == 8
    assert edited.ids.shape == (1, 23)
    assert cache.get_seq_length() == 10
    assert rg.cache.edit(model, cache, ids, [(0, 10)]).cache.get_seq_length() == 0


def drift(model: Any, originals: bool, turns: int = 8) -> tuple[Any, Any]:
    """A cache, and what it is when tokens were put in and taken out again so many times, one at a time."""
    ids = text(model, 40)
    cache = cached(model, ids)
    now = rg.cache.Edited(cache, torch.cat((ids, ids[:, :1]), 1), None)
    for number in range(turns + 1):
        edits = [(3, 0, [5, 7 + number % 3])] if number < turns else [(3, 2 * turns)]
        now = rg.cache.edit(model, now.cache, now.ids, edits)
        if not originals:
            now.cache.regauge_moved = None
    return cache, now.cache


def test_one_edit_after_another_adds_no_rounding_to_keys_of_16_bits() -> None:
    model = pico("llama", dtype=torch.bfloat16)
    before, after = drift(model, originals=True)
    assert all(one.keys.equal(other.keys) for one, other in zip(before.layers, after.layers, strict=True))
    before, after = drift(model, originals=False)
    pairs = [(one.keys.float(), other.keys.float()) for one, other in zip(before.layers, after.layers, strict=True)]
    assert 1e-3 < max(float((one - other).norm() / one.norm()) for one, other in pairs) < 3e-2


def test_an_edit_turns_each_kept_key_once_and_the_model_reads_what_is_new_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the cache was edited before: keys are known as those that were moved without turning them again."""
    model = pico("llama", dtype=torch.bfloat16)
    ids, turned, read = text(model, 40), list[int](), list[int]()
    edited = rg.cache.edit(model, cached(model, ids), ids, [(3, 0, [5])])
    monkeypatch.setattr(moving, "turn", lambda keys, *how: turned.append(keys.shape[2]) or turn(keys, *how))
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, options: read.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    before = [layer.keys.clone() for layer in edited.cache.layers]
    again = rg.cache.edit(model, edited.cache, edited.ids, [(3, 1), (20, 0, [7, 8])])
    assert turned == [20] * 2  # tokens 4 to 20 go back to where they were read, and are not turned at all
    assert read == [2]
    assert all(layer.keys.equal(was) for layer, was in zip(edited.cache.layers, before, strict=True))
    assert again.cache.get_seq_length() == 41


def test_originals_that_the_cache_holds_no_more_are_not_used() -> None:
    """Sequences in another order, and tokens taken back: the next edit turns what is there."""
    model = pico("llama", dtype=torch.bfloat16)
    ids = text(model, batch=2)
    edited = rg.cache.edit(model, cached(model, ids), torch.cat((ids, ids[:, :1]), 1), [(2, 0, [5])])
    edited.cache.reorder_cache(torch.tensor([1, 0]))
    edited.cache.crop(-4)
    swapped = edited.ids[[1, 0]]
    again = rg.cache.edit(model, edited.cache, swapped, [(2, 1)])
    first = cached(model, ids[[1, 0]])
    for now, then in zip(again.cache.layers, first.layers, strict=True):
        assert now.keys.shape[2] == 19
        assert torch.allclose(now.keys.float(), then.keys[:, :, :19].float(), rtol=0.02, atol=0.02)


def test_sequences_padded_on_the_left_and_texts_that_differ() -> None:
    model = pico("llama", dtype=torch.float64)
    alone = [text(model, 20, seed=1), text(model, 17, seed=2)]
    ids = torch.cat((alone[0], torch.nn.functional.pad(alone[1], (3, 0))))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = cached(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    edited = rg.cache.edit(model, cache, ids, [(5, 2, torch.tensor([[1, 2, 3], [4, 5, 6]])), (12, 4)], mask)
    assert edited.attention_mask is not None
    assert edited.attention_mask.tolist() == [[1] * 17, [0] * 3 + [1] * 14]
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(edited.ids, attention_mask=edited.attention_mask, past_key_values=edited.cache, **options)
    for row, (one, pads) in enumerate(zip(alone, (0, 3), strict=True)):
        inserted = [[1, 2, 3], [4, 5, 6]][row]
        single = rg.cache.edit(model, cached(model, one), one, [(5 - pads, 2, inserted), (12 - pads, 4)])
        assert single.ids[0].equal(edited.ids[row, pads:])
        assert model.generate(single.ids, past_key_values=single.cache, **options)[0].equal(together[row, pads:])


def test_a_growing_cache_is_edited_like_any_other() -> None:
    model = pico("gemma3")
    ids = text(model, 6)
    stock, ours = cached(model, ids[:, :4]), cached(model, ids[:, :4])
    adopt(ours, 2)
    found = [rg.cache.edit(model, cache, ids, [(1, 1), (2, 0, [4])]).cache for cache in (stock, ours)]
    for one, other in zip(found[0].layers, found[1].layers, strict=True):
        assert one.keys.equal(other.keys)
        assert type(one) is type(other)
    assert [type(layer) for layer in found[0].layers] == [SlidingLayer, GrowingLayer]


def test_a_packed_cache_is_edited_as_an_approximation_that_is_asked_for() -> None:
    """Eight bits: it decodes to what an edit of the same tokens in full precision gives, but for their steps."""
    model = pico("llama")
    ids = text(model, 120)
    cache, whole = cache_of(plan_of(kivi(8, group=5), 2), model), cached(model, ids)
    cached(model, ids, past_key_values=cache)
    assert cache.layers[0].origin > 40
    edits = [(10, 3), (70, 0, [1, 2])]
    with pytest.raises(
        SettingError, match="layer 0 holds keys in codes, which do not turn without being rounded again"
    ):
        rg.cache.edit(model, cache, ids, edits)
    ours = rg.cache.edit(model, cache, ids, edits, approximate=True).cache
    exact = rg.cache.edit(model, whole, ids, edits).cache
    assert type(ours) is type(cache)
    assert ours.layers[0].origin == cache.layers[0].scheme.sealed(118)
    for one, other in zip(ours.layers, exact.layers, strict=True):
        for name in ("keys", "values"):
            wanted = getattr(other, name)
            assert float((getattr(one, name) - wanted).norm() / wanted.norm()) < 0.03
    cache.layers[1].chosen = True
    with pytest.raises(SettingError, match="layer 1 keeps only some of the tokens"):
        rg.cache.edit(model, cache, ids, edits, approximate=True)


def test_a_window_that_has_moved_on() -> None:
    """What stands before it can be taken out; what is new can look back only to what is held."""
    model = pico("mistral", dtype=torch.float64)
    ids = text(model, 30)
    cache = cached(model, ids[:, :29])
    edited = rg.cache.edit(model, cache, ids, [(3, 5)])
    layer, old = edited.cache.layers[0], cache.layers[0]
    assert (edited.cache.get_seq_length(), layer.origin) == (24, 20)
    rotary, here = model.model.rotary_emb, torch.arange(25, 29).unsqueeze(0)
    tables = [tuple(table[..., :5] for table in rotary(old.keys, at)) for at in (here, here - 5)]
    assert torch.allclose(layer.keys, turn(old.keys, turning(tables[0], tables[1], torch.float64), "half"))
    assert model.generate(edited.ids, past_key_values=edited.cache, max_new_tokens=9, do_sample=False).shape == (1, 34)
    for edits in ([(3, 0, [1])], [(27, 1)]):
        with pytest.raises(SettingError, match=r"the window of layer 0 has let go of the first 25 tokens"):
            rg.cache.edit(model, cache, ids, edits)
    whole = DynamicCache(config=model.config)
    whole.activate_past_recording()
    cached(model, ids[:, :29], past_key_values=whole)
    edited = rg.cache.edit(model, whole, ids, [(3, 0, [1]), (27, 1)])
    assert edited.cache.get_seq_length() == 29


def test_edits_are_found_from_two_texts() -> None:
    assert rg.cache.changes([5, 6, 7, 8], [5, 9, 9, 8]) == [(1, 2, [9, 9])]
    assert rg.cache.changes([1, 2, 3], [1, 2, 3]) == []
    assert rg.cache.changes([1, 1, 1], [1, 1]) == [(2, 1, [])]
    model = pico("llama")
    old, new = (
        text(model, 30),
        torch.cat((text(model, 30)[:, 4:20], text(model, 5, seed=9), text(model, 30)[:, 21:]), 1),
    )
    edits = rg.cache.changes(old[0].tolist(), new[0].tolist())
    assert rg.cache.edit(model, cached(model, old), old, edits).ids.equal(new)


REFUSED = {
    "gpt2": "has no rotary embedding by which cached keys could be moved",
    "falcon-rw": "no key of FalconForCausalLM turns with its position",
    "llama-dynamic-rope": "is of type dynamic, which changes with the length of the text",
    "hunyuan_v1_dense": "do not turn as its rotary embedding says",
    "lfm2": "keeps a LinearAttentionLayer, which says nothing of single tokens",
    "deepseek_v3": "do not turn as its rotary embedding says",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_whose_keys_cannot_be_moved(family: str) -> None:
    model = build(family)
    ids = text(model, 5)
    with pytest.raises(ModelError, match=REFUSED[family]):
        rg.cache.edit(model, cached(model, ids), ids, [(1, 1)])


def test_what_is_no_edit_of_this_text() -> None:
    model = pico("llama")
    ids = text(model, 9)
    cache = cached(model, ids)
    fixed = StaticCache(config=model.config, max_cache_len=16)
    for edits, kept, message in (
        ([(8, 2)], cache, "no 2 tokens from 8 on in a text of 9"),
        ([(-1, 0, [1])], cache, "no 0 tokens from -1 on"),
        ([(2, 3), (4, 1)], cache, "two edits touch token 4"),
        ([(1, "2")], cache, r"an edit is \(at, remove, insert\)"),
        ([()], cache, r"an edit is \(at, remove, insert\)"),
        ([(1, 0, [53])], cache, "integers from 0 to 52"),
        ([(1, 0, [0.5])], cache, "a list of ids"),
        ([(1, 0, torch.ones(3, 2, dtype=torch.long))], cache, "a list of ids or one a sequence"),
        ([(0, 9)], cache, "leave nothing of the text"),
        ([(1, 1)], fixed, "a StaticCache cannot be read"),
        ([(1, 1)], DynamicCache(config=model.config), "the cache is empty"),
        ([(1, 1)], cached(pico("qwen3"), ids.repeat(1, 2)), "18 tokens, which are not the first"),
        ([(1, 1)], cached(pico("llama", head_dim=6), ids), "of another model"),
    ):
        with pytest.raises(SettingError, match=message):
            rg.cache.edit(model, kept, ids, edits)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with pytest.raises(SettingError, match="token 1 is padding"):
        rg.cache.edit(model, cache, ids, [(1, 1)], mask)
    with pytest.raises(SettingError, match="pads on the left"):
        rg.cache.edit(model, cache, ids, [(1, 1)], mask.flip(1))
