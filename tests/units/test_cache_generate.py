"""transformers' own generation over packed caches, beside a cache that keeps everything and rounds it at each call."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import regauge as rg
from pico import pico
from regauge.cache.scheme import Scheme
from regauge.errors import ModelError
from regauge.formats.grains import Time, Token
from regauge.hosts.transformers.cache import GrowingLayer, SlidingLayer
from regauge.hosts.transformers.packed import PackedCache, PackedLayer, cache_of
from stores import SCHEMES as STORES
from stores import asymmetric, coded, kivi, plan_of, symmetric

SCHEMES = {
    "kivi-2": kivi(2, window=8),
    "kivi-4": kivi(4, window=40),
    "kv8": Scheme(symmetric(8, Token()), symmetric(8, Token())),
    "rotated-4": Scheme(asymmetric(4, Time(16)), asymmetric(4, Token()), 5, hadamard=True),
}
MORE = SCHEMES | {name: STORES[name] for name in ("balanced", "fp8")}
"""Also those that `Recomputed` has no formula for."""
BLOCKS = 2


class Recomputed(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keeps everything as it came, and gives the older tokens rounded."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        sealed = self.scheme.sealed(self.get_seq_length())
        super().update(key_states, value_states)
        return tuple(
            coded(held, fmt, sealed, self.scheme.hadamard)
            for held, fmt in zip((self.keys, self.values), self.scheme.formats, strict=True)
        )  # type: ignore[return-value]  # two


@pytest.fixture(scope="module")
def model() -> Any:
    made = pico("llama", head_dim=16, max_position_embeddings=512)
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = None
    return made


def prompts(batch: int, tokens: int, padding: bool = False) -> dict[str, Tensor]:
    """A text that repeats itself, so that a look-up finds something; with 0, 2, 4 ... tokens of padding on the left."""
    ids = torch.randint(3, 50, (batch, 9), generator=torch.Generator().manual_seed(tokens)).repeat(1, tokens // 9 + 1)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row in range(batch if padding else 0):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids[:, :tokens], "attention_mask": mask}


def ours(scheme: Scheme, model: Any) -> PackedCache:
    return cache_of(plan_of(scheme, BLOCKS), model)


def theirs(scheme: Scheme) -> DynamicCache:
    cache = DynamicCache()
    cache.layers[:] = [Recomputed(scheme) for _ in range(BLOCKS)]
    cache.layer_class_to_replicate = None
    return cache


def written(model: Any, cache: Any, inputs: dict[str, Tensor], new: int = 45, **how: Any) -> Tensor:
    torch.manual_seed(5)
    how = {"do_sample": False} | how
    found: Tensor = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how
    )
    return found


def agree(model: Any, scheme: Scheme, inputs: dict[str, Tensor], new: int = 45, **how: Any) -> None:
    cache, reference = ours(scheme, model), theirs(scheme)
    found, wanted = written(model, cache, inputs, new, **how), written(model, reference, inputs, new, **how)
    assert found.tolist() == wanted.tolist()
    assert cache.get_seq_length() == reference.get_seq_length()
    layer = cache.layers[0]
    assert layer.origin == scheme.sealed(layer.length) > 0
    wanted_keys = coded(reference.layers[0].keys, scheme.keys, layer.origin, scheme.hadamard)
    close = torch.isclose(layer.keys, wanted_keys, atol=2e-3, rtol=1e-3)
    assert close.float().mean() > 0.995, "a number on the edge between two codes may take either"


def test_the_schemes_change_what_is_written(model: Any) -> None:
    """Or the tests here would tell nothing."""
    inputs = prompts(1, 50)
    plain = written(model, DynamicCache(), inputs)
    assert written(model, ours(SCHEMES["kivi-2"], model), inputs).tolist() != plain.tolist()


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("name", SCHEMES)
def test_greedy(name: str, tokens: int, model: Any) -> None:
    agree(model, SCHEMES[name], prompts(1, tokens), 80 if tokens == 1 else 50)


HOW: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
    "look-up": {"prompt_lookup_num_tokens": 4},
    "chunks": {"prefill_chunk_size": 9},
    "chunks of a block": {"prefill_chunk_size": 32},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SCHEMES)
def test_other_ways(name: str, how: str, model: Any) -> None:
    agree(model, SCHEMES[name], prompts(1, 70), 30, **HOW[how])


@pytest.mark.parametrize("name", SCHEMES)
def test_assisted(name: str, model: Any) -> None:
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    agree(model, SCHEMES[name], prompts(1, 70), 40, assistant_model=assistant)


@pytest.mark.parametrize("name", SCHEMES)
def test_left_padding_in_a_batch_of_seven(name: str, model: Any) -> None:
    agree(model, SCHEMES[name], prompts(7, 61, padding=True), 20)
    agree(model, SCHEMES[name], prompts(7, 61, padding=True), 20, num_beams=2)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_chat_is_continued_cropped_and_branched(name: str, model: Any) -> None:
    scheme = SCHEMES[name]
    cache, first = ours(scheme, model), prompts(1, 60)
    answer = written(model, cache, first, 20)
    branch = copy.deepcopy(cache)
    longer = {"input_ids": torch.cat((answer, answer[:, 3:11]), 1)}
    reference = theirs(scheme)
    assert written(model, reference, first, 20).tolist() == answer.tolist()
    assert written(model, cache, longer, 15).tolist() == written(model, reference, longer, 15).tolist()
    assert branch.get_seq_length() == 79
    assert written(model, branch, longer, 15).shape[1] == 88 + 15
    cache.crop(-(cache.get_seq_length() - 79))
    cache.crop(-19)
    assert (cache.get_seq_length(), cache.layers[1].length) == (60, 60)
    again = written(model, cache, {"input_ids": torch.cat((first["input_ids"], answer[:, 60:61]), 1)}, 10)
    assert again.shape[1] == 71
    cache.reset()
    assert written(model, cache, first, 20).tolist() == answer.tolist()


def test_sequences_repeat_and_are_selected(model: Any) -> None:
    cache, inputs = ours(SCHEMES["kivi-4"], model), prompts(2, 75)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    one = [layer.keys[1] for layer in cache.layers]
    cache.batch_repeat_interleave(2)
    assert all(layer.keys[2:].equal(torch.stack((one[i], one[i]))) for i, layer in enumerate(cache.layers))
    cache.batch_select_indices(torch.tensor([False, False, True, False]))
    assert all(layer.keys.equal(one[i][None]) for i, layer in enumerate(cache.layers))
    cache.reorder_cache(torch.tensor([0, 0, 0]))
    assert next(iter(cache))[0].shape[0] == 3
    assert cache.is_croppable


@pytest.mark.parametrize("name", MORE)
def test_a_chat_is_saved_and_goes_on(name: str, model: Any, tmp_path: Path) -> None:
    cache = ours(MORE[name], model)
    answer = written(model, cache, prompts(2, 90), 20)
    longer = {"input_ids": torch.cat((answer, answer[:, 3:11]), 1)}
    loaded = rg.cache.load(model, rg.cache.save(model, cache, tmp_path / "chat"), cache.plan)
    for how in ({}, {"num_beams": 2}):
        texts = [written(model, copy.deepcopy(one), longer, 15, **how).tolist() for one in (cache, loaded)]
        assert texts[0] == texts[1]
        for one in (cache, loaded):
            one.batch_repeat_interleave(2)


@pytest.mark.parametrize("name", MORE)
def test_two_conversations_in_two_threads(name: str, model: Any) -> None:
    texts = [prompts(1, 90 + n) for n in range(2)]
    wanted = [written(model, ours(MORE[name], model), text, 30).tolist() for text in texts]
    found: list[Any] = [None, None]

    def write(n: int) -> None:
        found[n] = written(model, ours(MORE[name], model), texts[n], 30).tolist()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_what_each_layer_becomes() -> None:
    sliding = pico("gemma3")
    made = cache_of(plan_of(kivi(2), 2), pico("llama"))
    assert [type(layer) for layer in made.layers] == [PackedLayer] * 2
    half = plan_of(kivi(2), 2)
    half = type(half)("half", (None, half.blocks[1]))
    assert [type(layer) for layer in cache_of(half, sliding).layers] == [SlidingLayer, PackedLayer]
    assert [type(layer) for layer in cache_of(half, pico("llama")).layers] == [GrowingLayer, PackedLayer]
    with pytest.raises(ModelError, match="block 0, whose past is a DynamicSlidingWindowLayer"):
        cache_of(plan_of(kivi(2), 2), sliding)
    with pytest.raises(ModelError, match="a cache of 3 blocks, and this model has 2"):
        cache_of(plan_of(kivi(2), 3), sliding)
    with pytest.raises(ModelError, match="cannot be set"):
        made.layers[0].keys = torch.zeros(1)
    with pytest.raises(ModelError, match="leave offloading out"):
        made.layers[0].offload()
    with pytest.raises(ValueError, match="by a negative number, not 3"):
        made.layers[0].crop(3)
