"""Sequences that share a prefix: they decode as if each had it, and it lies in memory once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from pico import pico, save
from regauge.errors import SettingError
from regauge.kernels.cpu.library import available
from regauge.runtime.store.branched import Branched


def prefixed(model: Any, tokens: int) -> tuple[Tensor, Any]:
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, model(ids[:, :-1], use_cache=True).past_key_values


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [20, 50])
def test_continuations_are_those_of_a_repeated_prefix(name: str, tokens: int) -> None:
    model = pico(name, max_position_embeddings=128)
    ids, cache = prefixed(model, tokens)
    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 7, "pad_token_id": 0}
    torch.manual_seed(1)
    wanted = model.generate(ids, **options)
    torch.manual_seed(1)
    assert model.generate(ids, past_key_values=rg.cache.share(cache, 3), **options).equal(wanted)
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 7, "pad_token_id": 0}
    assert model.generate(ids, past_key_values=rg.cache.share(cache, 3), **beams).equal(model.generate(ids, **beams))
    assert cache.get_seq_length() == tokens - 1


def test_the_native_step_reads_the_prefix_where_it_lies(tmp_path: Path) -> None:
    if not available():
        pytest.skip("the kernels are not built here")
    save(pico("llama", dtype=torch.bfloat16, hidden_size=48, head_dim=16, vocab_size=64), tmp_path / "model")
    rg.apply("rtn-w8", tmp_path / "model", tmp_path / "out", quiet=True)
    model = rg.load(tmp_path / "out")
    ids, cache = prefixed(model, 70)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    shared, before = rg.cache.share(cache, 3), model.regauge_step.steps
    found = model.generate(ids.expand(3, -1), past_key_values=shared, **options)
    assert model.regauge_step.steps > before + 5
    assert found.equal(model.generate(ids.expand(3, -1), **options))
    layer = shared.layers[0]
    (part,) = layer.parts()
    assert part.lengths_BK.tolist() == [[64] * 3] * 3
    assert part.key_blocks.data_ptr() == layer.shared[0].data_ptr()
    assert len(set(part.key_offsets_BK[:, 0].tolist())) == 1


def test_the_prefix_lies_in_memory_once() -> None:
    draw = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 1000, 8, generator=draw) for _ in range(2))
    store = Branched()
    store.branch(keys, values, 16)
    prefix = 2 * 2 * 992 * 8 * 4
    assert store.bytes - prefix == 2 * 16 * 2 * 256 * 8 * 4  # 8 tokens left over, and room
    assert store.keys is not None
    assert store.keys.equal(keys.expand(16, -1, -1, -1))
    store.append(keys[None, :, :2].expand(16, -1, -1, -1), values[None, :, :2].expand(16, -1, -1, -1))
    store.reorder(torch.tensor([3, 3]))
    assert store.values is not None
    assert store.values.equal(torch.cat((values, values[:, :2]), 1).expand(2, -1, -1, -1))
    store.keep(1000)
    with pytest.raises(ValueError, match="tokens 992 to 1000 cannot go back to 900"):
        store.keep(900)
    with pytest.raises(ValueError, match="share a prefix cannot be set"):
        store.keys = keys[None]


def test_what_cannot_be_shared() -> None:
    from transformers import DynamicCache

    model = pico("llama")
    _, cache = prefixed(model, 9)
    with pytest.raises(SettingError, match="not by 0"):
        rg.cache.share(cache, 0)
    with pytest.raises(SettingError, match="the cache is empty"):
        rg.cache.share(DynamicCache(), 2)
    cache.batch_repeat_interleave(2)
    with pytest.raises(SettingError, match="holds 2 sequences, and a prefix is one"):
        rg.cache.share(cache, 2)
