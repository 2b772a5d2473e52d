"""Replaced modules: what a rewrite changed becomes true of transformers' modules, in skeletons and loaded models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from regauge.anatomy.model import Anatomy, Weights
from regauge.errors import ModelError, MoveError
from regauge.hosts.precise import precise
from regauge.hosts.transformers.adapt import GaugedNorm, adapt_modules
from regauge.hosts.transformers.runner import Runner
from tests.pico import batches
from tests.streaming import distance, opened, run, stock


def with_bias(anatomy: Anatomy, *names: str) -> Anatomy:
    sites = tuple(
        replace(s, bias=replace(s.weight, key=f"{s.module}.bias", transposed=False)) if s.name in names else s
        for s in anatomy.sites
    )
    return replace(anatomy, sites=sites)


def test_modules_are_adapted_in_a_loaded_model() -> None:
    """What the loader relies on: parameters in place, of the model's dtype, doing nothing until they are filled."""
    model, source = opened("phi3")
    mine = copy.deepcopy(model)
    anatomy = with_bias(source.anatomy, "blocks.0.attn.q", "blocks.0.attn.v", "blocks.1.mlp.down")
    adapt_modules(mine, source.anatomy, anatomy)
    gained = set(dict(mine.named_parameters())) - set(dict(model.named_parameters()))
    assert gained == {"model.layers.0.self_attn.qkv_proj.bias", "model.layers.1.mlp.down_proj.bias"}
    assert mine.model.layers[0].self_attn.qkv_proj.bias.shape == (120,)
    assert {p.dtype for p in mine.parameters()} == {torch.float64}
    ids = batches(model)[0]
    with torch.no_grad():
        assert torch.equal(stock(mine, ids), stock(model, ids))
        mine.model.layers[1].mlp.down_proj.bias.fill_(1.0)
        assert distance(stock(mine, ids), stock(model, ids)) > 1e-3
    adapt_modules(mine, anatomy, source.anatomy)
    assert dict(mine.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_a_module_that_cannot_have_a_bias_is_an_error() -> None:
    model, source = opened("mixtral")
    anatomy = with_bias(source.anatomy, "blocks.0.moe.router")
    with pytest.raises(MoveError, match=r"blocks\.0\.moe\.router cannot be given a bias: its module is a Mixtral"):
        adapt_modules(copy.deepcopy(model), source.anatomy, anatomy)


def test_an_untied_head_must_be_given() -> None:
    model, source = opened("llama-tied")
    outer = {key: tensor for key, tensor in source.block(None).items() if key != "head.weight"}

    def weights(block: int | None) -> Weights:
        return outer if block is None else source.block(block)

    with torch.no_grad():
        found = next(Runner(source, dtype=torch.float64).logits(batches(model), weights))
        assert distance(found, stock(model, batches(model)[0])) < 1e-12
    with pytest.raises(ModelError, match=r"lack head\.weight"):
        Runner(source, replace(source.anatomy, tied=False)).begin(batches(model), outer)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "opt-nobias"])
def test_a_site_that_gained_a_bias_adds_it(name: str) -> None:
    model, source = opened(name)
    names = ("blocks.0.attn.q", "blocks.1.mlp.down", "blocks.1.mlp.up")
    anatomy = with_bias(source.anatomy, *names)
    biases = {f"{at}.bias": torch.linspace(-1, 1, anatomy.site(at).shape[0], dtype=torch.float64) for at in names}

    def weights(block: int | None) -> Weights:
        mine = {key: bias for key, bias in biases.items() if block is not None and key.startswith(f"blocks.{block}.")}
        return source.block(block) | mine

    with torch.no_grad():
        found = next(Runner(source, anatomy, dtype=torch.float64).logits(batches(model)[:1], weights))
    had = {at for at in names if source.anatomy.site(at).bias is not None}
    old = {at: source.read([f"{at}.bias"])[f"{at}.bias"] if at in had else 0.0 for at in names}
    wanted = run(name, outputs={at: lambda y, at=at: y - old[at] + biases[f"{at}.bias"] for at in names})
    assert distance(found, wanted) < 1e-12


def test_a_norm_of_another_kind_is_replaced() -> None:
    """LayerNorm of a centred input is RMSNorm: centre what writes GPT-2's residual by hand, change the norms' kind."""
    model, source = opened("gpt2")
    norms = tuple(replace(norm, kind="rms") for norm in source.anatomy.norms)
    anatomy = replace(source.anatomy, norms=norms, tied=False)

    def weights(block: int | None) -> Weights:
        found = dict(source.block(block))
        for key, tensor in found.items():
            if key.startswith("embed"):
                found[key] = tensor - tensor.mean(1, keepdim=True)
            elif key.endswith((".o.weight", ".down.weight", ".o.bias", ".down.bias")):
                found[key] = tensor - tensor.mean(0, keepdim=True)
        return found

    inputs = batches(model)[:1]
    with torch.no_grad(), precise():
        found = next(Runner(source, anatomy, dtype=torch.float64).logits(inputs, weights))
        assert distance(found, stock(model, inputs[0])) < 1e-13
        assert any(type(module) is GaugedNorm for module in Runner(source, anatomy).shell.modules())
        layer = next(Runner(source, dtype=torch.float64).logits(inputs, weights))
        assert distance(layer, found) < 1e-13


@pytest.mark.parametrize(("name", "path", "kind"), [
    ("gpt2", "transformer.h.0.ln_1", "layer"),
    ("gemma2", "model.layers.0.input_layernorm", "rms"),
    ("llama", "model.layers.0.input_layernorm", "rms"),
])  # fmt: skip
def test_our_norm_is_transformers_norm(name: str, path: str, kind: str) -> None:
    model, source = opened(name)
    theirs = copy.deepcopy(model.get_submodule(path))
    norm = next(norm for norm in source.anatomy.norms if norm.module == path)
    bias = getattr(theirs, "bias", None)
    ours = GaugedNorm(kind, norm.size, norm.eps, bias=bias is not None, offset=norm.offset).double()
    x = torch.randn(3, 5, norm.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with precise():
        assert distance(ours(x), theirs(x)) > 1e-3, "gains of one are not theirs"
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-14)
    half = x.bfloat16()
    torch.testing.assert_close(ours.bfloat16()(half), theirs.to(torch.bfloat16)(half), rtol=0.02, atol=0.02)
