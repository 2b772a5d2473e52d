"""Family tables: what each says of a pico model, checked against literals and against transformers' modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from regauge.anatomy.model import Anatomy, Attention, Slot
from regauge.anatomy.storage import gather, scatter
from regauge.anatomy.streams import KINDS
from regauge.errors import ModelError, UnknownArchitecture
from regauge.hosts.transformers.columns import Table
from regauge.hosts.transformers.skeleton import parameters, skeleton
from regauge.hosts.transformers.table import anatomy_of
from regauge.hosts.transformers.tables import FAMILIES as FOLDER
from regauge.hosts.transformers.tables import check_type, tables
from tests import architectures
from tests.pico import CONFIGS, FAMILIES, PICOS, pico


def anatomy(name: str, **changes: Any) -> Anatomy:
    return anatomy_of(pico(name, **changes).config)


def test_every_family_of_the_issue_has_a_table() -> None:
    wanted = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt2 gpt_neox opt bert vit mixtral qwen3_moe"
    assert set(wanted.split()) <= set(tables())
    assert {CONFIGS[name][0] for name in FAMILIES} <= set(tables())


@pytest.mark.parametrize("name", PICOS)
def test_tables_describe_every_parameter_once(name: str) -> None:
    model = pico(name)
    found = anatomy_of(model.config)
    total = sum(site.shape[0] * site.shape[1] for site in found.sites if not (found.tied and site.name == "head"))
    total += sum(site.shape[0] for site in found.sites if site.bias is not None)
    total += sum(norm.size * ((norm.gain is not None) + (norm.bias is not None)) for norm in found.norms)
    outside = {note.split()[0] for note in found.notes}
    total += sum(p.numel() for key, p in model.named_parameters() if key in outside)
    assert total == sum(p.numel() for p in model.parameters())
    names = [item.name for item in (*found.sites, *found.norms)]
    assert len(names) == len(set(names))
    assert {site.kind for site in found.sites} <= set(KINDS)


@pytest.mark.parametrize("name", PICOS)
def test_scatter_undoes_gather(name: str) -> None:
    model = pico(name, dtype=torch.float64)
    found = anatomy_of(model.config)
    stored = parameters(model)
    weights = gather(found, stored)
    back = scatter(found, weights, {key: tuple(p.shape) for key, p in stored.items()})
    for key, value in back.items():
        assert value.shape == stored[key].shape, key
        torch.testing.assert_close(value, stored[key].detach(), rtol=0, atol=3e-16)
    shapes = {f"{site.name}.weight": site.shape for site in found.sites}
    assert all(tuple(weights[key].shape) == shape for key, shape in shapes.items())
    assert all(weights[key].shape[0] == weights[key.replace(".bias", ".weight")].shape[0] for key in weights
               if key.endswith(".bias") and key.replace(".bias", ".weight") in weights)  # fmt: skip


def test_a_bfloat16_gain_with_an_offset_survives() -> None:
    """1 + 2⁻¹⁰ is 1 in bfloat16; the canonical gain keeps it, and scatter gives the stored gain back."""
    model = pico("gemma2", dtype=torch.bfloat16)
    model.model.norm.weight.data.fill_(2.0**-10)
    found = anatomy_of(model.config)
    gain = gather(found, parameters(model))["norm.gain"]
    assert gain.dtype == torch.float32
    assert gain.unique().tolist() == [1.0009765625]
    assert scatter(found, {"norm.gain": gain})["model.norm.weight"].unique().tolist() == [2.0**-10]


def test_llama_by_hand() -> None:
    found = anatomy("llama")
    assert (found.blocks, found.hidden) == (2, 42)
    assert found.attentions == (Attention(6, 3, 10, 10),) * 2
    assert found.cached == 2 * 3 * (10 + 10)
    assert [site.name for site in found.in_block(1)] == [
        f"blocks.1.{place}" for place in ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    ]
    down = found.site("blocks.1.mlp.down")
    assert down.shape == (42, 37)
    assert (down.kind, down.block, down.bias, down.expert) == ("down", 1, None, None)
    assert down.weight == Slot("model.layers.1.mlp.down_proj.weight")
    assert down.module == "model.layers.1.mlp.down_proj"
    taps = {site.kind: site.tap for site in found.in_block(0)}
    assert taps["q"] == taps["k"] == taps["v"] == "blocks.0.attn.in"
    assert taps["gate"] == taps["up"] == "blocks.0.mlp.in"
    assert (taps["o"], taps["down"]) == ("blocks.0.attn.mixed", "blocks.0.mlp.hidden")
    assert found.site("head").tap == "head.in"
    assert not found.tied
    assert anatomy("llama-tied").tied
    assert {site.kind for site in anatomy("llama-bias").sites if site.bias} == {*"qkvo", "gate", "up", "down"}
    assert {site.kind for site in anatomy("qwen2").sites if site.bias} == {*"qkv"}
    assert {site.kind for site in anatomy("opt").sites if site.bias} == {*"qkvo", "up", "down"}
    assert not any(site.bias for site in anatomy("opt-nobias").sites)


def test_fused_storage_by_hand() -> None:
    phi = anatomy("phi3")
    assert phi.site("blocks.0.attn.k").weight == Slot("model.layers.0.self_attn.qkv_proj.weight", rows=(60, 90))
    assert phi.site("blocks.0.mlp.up").weight == Slot("model.layers.0.mlp.gate_up_proj.weight", rows=(37, 74))
    gpt = anatomy("gpt2")
    key = "transformer.h.1.attn.c_attn"
    assert gpt.site("blocks.1.attn.v").weight == Slot(f"{key}.weight", transposed=True, rows=(66, 99))
    assert gpt.site("blocks.1.attn.v").bias == Slot(f"{key}.bias", rows=(66, 99))
    neox = anatomy("gpt_neox")
    assert neox.site("blocks.0.attn.q").weight.heads == (3, 3, 0)
    assert neox.site("blocks.0.attn.v").shape == (30, 30)
    moe = anatomy("mixtral")
    key = "model.layers.0.mlp.experts"
    assert moe.site("blocks.0.moe.4.up").weight == Slot(f"{key}.gate_up_proj", index=4, rows=(37, 74))
    assert moe.site("blocks.0.moe.4.down").weight == Slot(f"{key}.down_proj", index=4)
    assert moe.site("blocks.0.moe.4.down").tap == "blocks.0.moe.4.hidden"
    assert moe.site("blocks.0.moe.router").tap == "blocks.0.mlp.in"


def test_interleaved_heads_are_taken_head_by_head() -> None:
    """Two heads of two channels: the rows of the fused matrix are q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1."""
    found = anatomy("gpt_neox", hidden_size=4, num_attention_heads=2)
    fused = torch.arange(12.0)[:, None].expand(12, 4)
    key = "gpt_neox.layers.0.attention.query_key_value.weight"
    weights = gather(found, {key: fused})
    assert weights["blocks.0.attn.q.weight"][:, 0].tolist() == [0, 1, 6, 7]
    assert weights["blocks.0.attn.k.weight"][:, 0].tolist() == [2, 3, 8, 9]
    assert weights["blocks.0.attn.v.weight"][:, 0].tolist() == [4, 5, 10, 11]


def test_mixed_dense_and_expert_layers() -> None:
    found = anatomy("qwen3_moe")
    assert {site.name.split(".")[2] for site in found.in_block(0)} == {"attn", "mlp"}
    assert {site.name.split(".")[2] for site in found.in_block(1)} == {"attn", "moe"}
    assert len([site for site in found.in_block(1) if site.expert is not None]) == 15


def test_norms_and_plumbing_by_hand() -> None:
    gemma = anatomy("gemma2")
    assert {norm.offset for norm in gemma.norms} == {1.0}
    assert gemma.plumbing.arrangement == "sandwich"
    assert gemma.norm("blocks.0.attn.post").module == "model.layers.0.post_attention_layernorm"
    bert = anatomy("bert")
    assert bert.plumbing.arrangement == "post"
    assert not bert.causal
    assert bert.norm("embed.norm").kind == "layer"
    assert bert.norm("embed.norm").bias == Slot("embeddings.LayerNorm.bias")
    assert (anatomy("phi3").plumbing.rotary, anatomy("llama").plumbing.rotary, bert.plumbing.rotary) == (4, 10, 0)
    assert anatomy("opt").plumbing.activation == "relu"
    assert anatomy("opt").norm("norm").eps == 1e-5
    assert anatomy("qwen3").norm("blocks.1.attn.k.norm").size == 10
    vit = anatomy("vit")
    shapes = {site.name: site.shape for site in vit.sites if site.block is None}
    assert shapes == {"embed.patch": (33, 50), "embed.class": (1, 33), "embed.position": (10, 33), "head": (7, 33)}


def test_a_residual_that_is_the_output_stays_where_it_is() -> None:
    for name in ("llama-headless", "bert", "bert-mlm", "vit-headless"):
        stops = anatomy(name).stream("residual").stops
        assert {"permute", "select", "rotate"} <= stops.keys(), name
    assert "permute" in anatomy("llama").stream("residual").admits


def test_an_unknown_architecture_names_the_table_to_copy_and_never_a_misspelling() -> None:
    for model_type, near in [("lama", "llama.yaml"), ("qwen4", "qwen3.yaml"), ("nothing_like_it", "llama.yaml")]:
        with pytest.raises(UnknownArchitecture) as caught:
            check_type(model_type)
        said = f"model_type {model_type!r}; to add one, copy {near}, change what differs and give it with --family FILE"
        assert str(caught.value) == f"no family table describes {said}: docs/families.md tells how"


def test_settings_that_a_table_does_not_describe_are_refused() -> None:
    with pytest.raises(ModelError, match=r"opt with do_layer_norm_before=False cannot be used .*opt-350m"):
        anatomy("opt", do_layer_norm_before=False)
    with pytest.raises(ModelError, match=r"word_embed_proj_dim=11 cannot be used \(it must be 33\)"):
        anatomy("opt", word_embed_proj_dim=11)
    with pytest.raises(ModelError, match="is_decoder=True"):
        anatomy("bert", is_decoder=True)


def test_a_table_that_forgets_a_parameter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = next(yaml.safe_load_all((FOLDER / "llama.yaml").read_text()))
    raw["sites"]["attn.o"] = "self_attn.out_proj"
    monkeypatch.setattr("regauge.hosts.transformers.table.table_for", lambda _: Table.model_validate(raw))
    with pytest.raises(ModelError, match=r"describes no parameter 'model\.layers\.0\.self_attn\.o_proj\.weight'"):
        anatomy("llama")


def test_an_unknown_column_is_an_error() -> None:
    raw = next(yaml.safe_load_all((FOLDER / "llama.yaml").read_text())) | {"arangement": "pre"}
    with pytest.raises(ValidationError, match="arangement"):
        Table.model_validate(raw)


@pytest.mark.parametrize("name", PICOS)
def test_skeletons_hold_no_weights_and_their_buffers_are_those_of_a_real_model(name: str) -> None:
    model = pico(name)
    before = torch.get_rng_state()
    meta = skeleton(model.config)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.is_meta for parameter in meta.parameters())
    real = dict(model.named_buffers())
    for key, buffer in meta.named_buffers():
        assert torch.equal(buffer, real[key]), key
    assert not meta.training


def test_falcon_40b_keeps_keys_and_values_once_for_each_of_its_heads_of_queries() -> None:
    """Its four heads of 10 ask, two are computed, and four of each are kept: 2 blocks x 4 heads x (10 + 10)."""
    found = anatomy_of(architectures.config_of("falcon-40b"))
    assert found.attentions == (Attention(4, 2, 10, 10),) * 2
    assert found.cached == 160


CACHED = [
    "llama", "deepseek_v2", "deepseek_v3", "qwen3_next", "gpt_bigcode", "falcon", "falcon-40b", "falcon_h1", "jamba",
    "lfm2", "gemma4_text",
]  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_what_a_token_leaves_in_the_cache_is_what_transformers_keeps(name: str) -> None:
    """Latent attention keeps its narrow layer and the turned channels; a recurrence keeps nothing a token."""
    model = architectures.build(name)
    ids = architectures.inputs(model, length=5)["input_ids"]  # a window of 6 still holds all of them
    with torch.no_grad():
        kept = model(input_ids=ids, use_cache=True).past_key_values
    found = [
        tensor
        for layer in kept.layers
        for key in ("keys", "values")
        if (tensor := getattr(layer, key, None)) is not None
    ]
    assert anatomy_of(model.config).cached * ids.numel() == sum(tensor.numel() for tensor in found)
