"""Latent attention decoded from its latent: what transformers' own expansion computes, read from the rows alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import regauge as rg
from regauge.engine import apply
from regauge.hosts.transformers import absorbing
from regauge.hosts.transformers.absorbing import LatentLayer, absorbed
from tests import tiny
from tests.architectures import build
from tests.pico import save

IDS = torch.arange(40).view(2, 20) * 7 % 53


def stock(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """As transformers opens it, and nobody absorbs."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def decoded(model: Any, ids: Tensor, mask: Tensor | None = None, first: int = 9, pieces: int = 1) -> Tensor:
    """Logits of all tokens: a prompt at once, then in pieces."""
    cache, found, at = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        while at < ids.shape[1]:
            stop = first if at == 0 else min(at + pieces, ids.shape[1])
            seen = None if mask is None else mask[:, :stop]
            positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, at:stop]}
            found.append(
                model(ids[:, at:stop], attention_mask=seen, past_key_values=cache, use_cache=True, **positions).logits
            )
            at = stop
    return torch.cat(found, 1)


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """New tokens of every call whose products were absorbed."""
    calls: list[int] = []

    def counted(query: Tensor, *rest: Any) -> Tensor:
        calls.append(query.shape[2])
        return absorbed(query, *rest)

    monkeypatch.setattr(absorbing, "absorbed", counted)
    return calls


@pytest.fixture(params=["deepseek_v2", "deepseek_v3", "transmla"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param != "transmla":
        return save(build(request.param), tmp_path / "model")
    model, out = tiny.folder(tmp_path / "source"), tmp_path / "out"
    apply("transmla-r50", model, out, calibration=tiny.text(tmp_path), tokens=256, length=32)
    return out


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_from_the_latent_is_the_expanded_form_in_float64(
    folder: Path, pieces: int, padded: bool, expansions: list[int]
) -> None:
    mask = torch.ones(2, 20, dtype=torch.int64)
    if padded:
        mask[1, :4] = 0
    given = mask if padded else None
    want = decoded(stock(folder), IDS, given, pieces=pieces)
    loaded = rg.load(folder, dtype="float64")
    found = decoded(loaded, IDS, given, pieces=pieces)
    torch.testing.assert_close(found[mask.bool()], want[mask.bool()], rtol=1e-10, atol=1e-10)
    blocks = loaded.config.num_hidden_layers
    assert expansions == [size for size in ([1] * 11 if pieces == 1 else [3, 3, 3, 2]) for _ in range(blocks)]


def test_beams_crops_and_copies_of_the_cache_are_what_they_are_elsewhere(folder: Path) -> None:
    mine, other = rg.load(folder, dtype="float64"), stock(folder)
    ask: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    assert torch.equal(mine.generate(IDS, attention_mask=mask, **ask), other.generate(IDS, attention_mask=mask, **ask))
    ends = []
    for model in (mine, other):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS, past_key_values=cache, use_cache=True)
            model(IDS[:, :1], past_key_values=cache, use_cache=True)
            cache.crop(-6)
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))
            ends.append(model(IDS[:, 4:5], past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == 16
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-10)


def test_the_cache_holds_rows_of_latent_and_turned_key_in_one_memory(folder: Path) -> None:
    model = rg.load(folder, dtype="float32")
    cache = DynamicCache(config=model.config)
    decoded_ids = IDS[:, :12]
    with torch.no_grad():
        model(decoded_ids, past_key_values=cache, use_cache=True)
    numbers = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    for layer in cache.layers:
        assert type(layer) is LatentLayer
        assert layer.keys.shape == (2, 1, 12, numbers)
        assert layer.bytes == 4 * 2 * layer.room * numbers
        assert layer.values.numel() == 0


def test_a_packed_matrix_behind_the_latent_is_decoded_once(tmp_path: Path, expansions: list[int]) -> None:
    model, out = save(build("deepseek_v3"), tmp_path / "model"), tmp_path / "out"
    apply("rtn-w8", model, out)
    loaded = rg.load(out, dtype="float32", activations="float32")
    with torch.no_grad():
        whole = loaded(IDS, use_cache=False).logits
    torch.testing.assert_close(decoded(loaded, IDS), whole, rtol=1e-4, atol=1e-4)
    assert expansions
    attention = next(module for module in loaded.modules() if isinstance(module, DeepseekV3Attention))
    held = attention.regauge_latent.held_OI
    assert held.shape == (attention.kv_b_proj.out_features, attention.kv_lora_rank)
    decoded(loaded, IDS)
    assert attention.regauge_latent.held_OI is held


def test_what_is_not_decoded_so_is_expanded_and_the_same(tmp_path: Path, expansions: list[int]) -> None:
    """Another backend, a hook on the product, a bias: the model's own way."""
    folder = save(build("deepseek_v3"), tmp_path / "model")
    want = decoded(stock(folder), IDS)
    for change in ("eager", "hook", "bias"):
        model = rg.load(folder, dtype="float64")
        for module in model.modules():
            if isinstance(module, DeepseekV3Attention) and change == "hook":
                module.kv_b_proj.register_forward_hook(lambda *_: None)
            elif isinstance(module, DeepseekV3Attention) and change == "bias":
                module.kv_b_proj.bias = torch.nn.Parameter(torch.zeros(module.kv_b_proj.out_features).double())
        bound = 1e-10
        if change == "eager":  # whose softmax is in float32
            model.set_attn_implementation("eager")
            bound = 1e-5
        torch.testing.assert_close(decoded(model, IDS), want, rtol=bound, atol=bound)
    assert not expansions


def test_copies_and_pickles_of_the_model_decode_so_too(tmp_path: Path) -> None:
    folder = save(build("deepseek_v3"), tmp_path / "model")
    model = rg.load(folder, dtype="float64")
    want = decoded(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(decoded(other, IDS), want)
