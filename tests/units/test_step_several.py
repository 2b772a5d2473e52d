"""Several tokens of a sequence in one call of the native step, low-rank terms, windows, blocks of unequal sizes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from artifacts import choice, make
from pico import pico, save
from regauge.hosts.transformers.cache import SlidingLayer
from regauge.kernels.cpu.library import available
from regauge.runtime.store.growing import ROOM
from units.test_step import DECODERS, EXACT, difference, loaded, padded

pytestmark = pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")


def grouped(forward: Any, model: Any, ids_BT: Tensor, mask_BT: Tensor, ends: list[int], **more: Any) -> Tensor:
    """Logits (B, T - ends[0], V) of all tokens after the prompt, so many a call."""
    from transformers import DynamicCache

    cache, found, start = DynamicCache(config=model.config), [], 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for stop in ends:
        with torch.no_grad():
            out = forward(
                input_ids=ids_BT[:, start:stop],
                attention_mask=mask_BT[:, :stop],
                position_ids=positions_BT[:, start:stop],
                past_key_values=cache,
                **more,
            )
        found.append(out.logits)
        start = stop
    return torch.cat(found[1:], 1).float()


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


@pytest.mark.parametrize("name", DECODERS)
def test_several_tokens_give_the_logits_of_one_by_one(name: str, tmp_path: Path) -> None:
    """Every family, alone and padded, calls of 2 to 16 tokens, past every sliding window."""
    model = loaded(tmp_path, name)
    for batch in (1, 3):
        ids_BT, mask_BT = padded(batch, 37)
        together = grouped(model, model, ids_BT, mask_BT, [7, 9, 13, 14, 30 if batch == 1 else 22, 37])
        assert model.regauge_step.steps == 30
        alone = grouped(model, model, ids_BT, mask_BT, list(range(7, 38)))
        assert model.regauge_step.steps == 60
        theirs = grouped(model.forward.__wrapped__, model, ids_BT, mask_BT, list(range(7, 38)))
        assert apart(together, alone) < 1e-6
        assert apart(together, theirs) < EXACT
        model.regauge_step.steps = 0


@pytest.mark.parametrize("form", ["int2", "asym", "nf4", "int8", "w8a8"])
def test_every_form_takes_several_tokens(form: str, tmp_path: Path) -> None:
    """With inputs rounded to 16 bits, or to 8 as the artifact says, each token by itself."""
    model = loaded(tmp_path, "llama", form, activations="int16")
    ids_BT, mask_BT = padded(2, 20)
    together, alone = (grouped(model, model, ids_BT, mask_BT, ends) for ends in ([7, 12, 20], list(range(7, 21))))
    assert model.regauge_step.steps == 26
    assert apart(together, alone) < (3e-2 if form == "w8a8" else 2e-4)


def test_it_gives_the_logits_that_are_asked_for(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    ids_BT, mask_BT = padded(2, 15)
    whole = grouped(model, model, ids_BT, mask_BT, [7, 15])
    for kept in (1, 3, 8, 20):
        assert apart(grouped(model, model, ids_BT, mask_BT, [7, 15], logits_to_keep=kept), whole[:, -kept:]) < 1e-6
    assert model.regauge_step.steps == 40
    with pytest.warns(rg.errors.FallbackWarning, match="logits_to_keep"):
        some = grouped(model, model, ids_BT, mask_BT, [7, 15], logits_to_keep=torch.tensor([2, 4]))
    assert model.regauge_step.steps == 40
    assert apart(some, whole[:, [2, 4]]) < EXACT


def test_many_tokens_on_a_cache_are_eagers(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    ids_BT, mask_BT = padded(1, 30)
    grouped(model, model, ids_BT, mask_BT, [7, 24])
    assert model.regauge_step.steps == 0
    ids_BT, mask_BT = padded(5, 30)
    grouped(model, model, ids_BT, mask_BT, [7, 20, 21])
    assert model.regauge_step.steps == 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_prompt_lookup_makes_the_tokens_of_greedy_decoding(name: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, name)
    ids = torch.tensor([[5, 9, 11, 7, 5, 9, 11, 7, 5, 9, 11]])
    kwargs = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    greedy = model.generate(ids, **kwargs)
    model.regauge_step.steps = 0
    assisted = model.generate(ids, prompt_lookup_num_tokens=5, **kwargs)
    assert assisted.equal(greedy)
    assert model.regauge_step.steps > 40 - 6  # all but the first call's


def test_a_smaller_model_drafts(tmp_path: Path) -> None:
    model, draft = loaded(tmp_path / "a", "mistral"), loaded(tmp_path / "b", "mistral", "int2")
    ids = torch.tensor([[5, 9, 11, 7, 5, 9]])
    kwargs = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, assistant_model=draft, **kwargs).equal(model.generate(ids, **kwargs))
    assert min(model.regauge_step.steps, draft.regauge_step.steps) > 24


def test_turns_of_a_conversation_go_on_with_one_cache(tmp_path: Path) -> None:
    from transformers import DynamicCache

    model = loaded(tmp_path, "llama")
    cache, ids = DynamicCache(config=model.config), padded(1, 11)[0]
    for turn in range(3):
        before = model.regauge_step.steps
        ids = torch.cat((ids, padded(1, 6, turn)[0]), 1)
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert model.regauge_step.steps - before == (4 if turn == 0 else 11)
    whole = model.forward.__wrapped__(input_ids=ids).logits[0, -6:-1].argmax(-1)
    assert ids[0, -5:].equal(whole)


def test_a_sliding_layer_keeps_its_window_alone(tmp_path: Path) -> None:
    """Hundreds of tokens behind a window of four: the memory does not grow, and the logits are transformers'."""
    from transformers import DynamicCache

    model = loaded(tmp_path, "mistral", max_position_embeddings=1024)
    ids = torch.randint(3, 50, (1, 900), generator=torch.Generator().manual_seed(3))
    cache, stock = DynamicCache(config=model.config), DynamicCache(config=model.config)
    rooms, worst = set(), 0.0
    with torch.no_grad():
        for start, stop in [(0, 5), *((t, t + 1) for t in range(5, 900))]:
            ours = model(input_ids=ids[:, start:stop], past_key_values=cache).logits[:, -1:]
            theirs = model.forward.__wrapped__(input_ids=ids[:, start:stop], past_key_values=stock).logits[:, -1:]
            worst = max(worst, apart(ours, theirs) if start else 0.0)
            rooms |= {layer.keys_BHTD.shape[2] for layer in cache.layers}
    assert model.regauge_step.steps == 895
    assert all(type(layer) is SlidingLayer and layer.length == 900 for layer in cache.layers)
    assert max(rooms) <= ROOM
    assert worst < EXACT


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gpt2"])
def test_a_low_rank_term_is_served(name: str, tmp_path: Path) -> None:
    path = save(pico(name), tmp_path / "source")
    skipped = ("position", "type", "embed")

    def form(site: Any) -> Any:
        return None if site.kind in skipped else choice("int3", lorc=5) if site.kind != "v" else choice("int4")

    made = make(path, tmp_path / "out", form, prefer="regauge")
    model = rg.load(made.path, activations="float32")
    assert any(len(getattr(module, "terms", ())) for module in model.modules())
    assert difference(model) < EXACT
    assert difference(model, batch=3) < EXACT


def test_experts_may_have_low_rank_terms(tmp_path: Path) -> None:
    path = save(pico("mixtral"), tmp_path / "source")
    kinds = ("gate", "up", "down")
    made = make(path, tmp_path / "out", lambda s: choice("int3", lorc=3) if s.kind in kinds else None, prefer="regauge")
    assert difference(rg.load(made.path, activations="float32"), batch=3) < EXACT


def test_layers_of_unequal_lengths_are_served(tmp_path: Path) -> None:
    """As when some blocks have let go of tokens that others keep."""
    from transformers import DynamicCache

    model = loaded(tmp_path, "llama")
    ids = padded(1, 12)[0]
    found = []
    for forward in (model, model.forward.__wrapped__):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            forward(input_ids=ids[:, :11], past_key_values=cache)
            layer = cache.layers[1]
            layer.keys, layer.values = layer.keys[:, :, :6].clone(), layer.values[:, :, :6].clone()
            found.append(forward(input_ids=ids[:, 11:], past_key_values=cache).logits)
    assert model.regauge_step.steps == 1
    assert apart(*found) < EXACT
    cache, mask = DynamicCache(config=model.config), torch.tensor([[0] * 2 + [1] * 10])
    with torch.no_grad(), contextlib.suppress(RuntimeError):  # with padding transformers cannot either
        model(input_ids=ids[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
        layer = cache.layers[1]
        layer.keys, layer.values = layer.keys[:, :, :6].clone(), layer.values[:, :, :6].clone()
        with pytest.warns(rg.errors.FallbackWarning, match="unequal numbers"):
            model(input_ids=ids[:, 11:], attention_mask=mask, past_key_values=cache)
    assert model.regauge_step.steps == 1
