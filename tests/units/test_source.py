"""Sources give back exactly what is stored, and read no more than is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regauge.errors import CorruptWeights, ModelError
from regauge.hosts.transformers.checkpoint import read_header
from regauge.hosts.transformers.source import Source
from tests.checkpoints import WEIGHTS, edit, rewrite, shard
from tests.pico import PICOS, pico, save


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(pico("llama"), tmp_path / "llama")


@pytest.mark.parametrize("name", PICOS)
def test_reads_what_is_stored(name: str, tmp_path: Path) -> None:
    model = pico(name, dtype=torch.bfloat16)
    source = Source.open(save(model, tmp_path))
    state = model.state_dict()
    for block in (None, *range(source.anatomy.blocks)):
        found = source.scatter(source.anatomy, source.block(block)) | source.extras(block)
        for key, tensor in found.items():
            assert torch.equal(tensor.to(torch.bfloat16), state.pop(key)), key
    assert not set(state) - source.tied.keys()
    assert source.dtype == torch.bfloat16
    assert source.bytes_bf16() == 2 * sum(p.numel() for p in model.parameters())
    assert source.unused == ()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_stored_one_by_one_or_stacked_read_alike(name: str, tmp_path: Path) -> None:
    model = pico(name)
    single, stacked = save(model, tmp_path / "single"), save(model, tmp_path / "stacked", fused=True)
    assert any(".experts.3." in key for key in read_header(single / WEIGHTS))
    assert any(key.endswith("experts.gate_up_proj") for key in read_header(stacked / WEIGHTS))
    one, other = Source.open(single), Source.open(stacked)
    names = [f"blocks.1.moe.{expert}.{kind}.weight" for expert in range(5) for kind in ("gate", "up", "down")]
    for key, tensor in one.read(names).items():
        assert torch.equal(tensor, other.read([key])[key]), key


def test_a_tied_head_is_the_embedding_and_counts_once(tmp_path: Path) -> None:
    source = Source.open(save(pico("llama-tied"), tmp_path))
    outer = source.block(None)
    assert source.anatomy.tied
    assert outer["head.weight"].data_ptr() == outer["embed.weight"].data_ptr()
    untied = Source.open(save(pico("llama"), tmp_path / "untied"))
    assert untied.parameters() - source.parameters() == 53 * 42


def test_a_tied_config_with_two_different_tensors_is_not_tied(tmp_path: Path) -> None:
    folder = save(pico("llama"), tmp_path)
    edit(folder, tie_word_embeddings=True)
    source = Source.open(folder)
    assert not source.anatomy.tied
    assert "two different tensors" in source.anatomy.notes[-1]
    assert not torch.equal(source.block(None)["head.weight"], source.block(None)["embed.weight"])


def test_a_tied_checkpoint_that_holds_only_the_head(tmp_path: Path) -> None:
    folder = save(pico("llama-tied"), tmp_path)
    before = Source.open(folder).read(["embed.weight"])["embed.weight"].clone()
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(Source.open(folder).read(["embed.weight"])["embed.weight"], before)


def test_old_names_are_translated(tmp_path: Path) -> None:
    """BERT's gamma and beta, a base model's missing prefix, GPT-2's stored masks."""
    folder = save(pico("bert"), tmp_path / "bert")
    rewrite(folder, lambda t: t.update({"embeddings.LayerNorm.gamma": t.pop("embeddings.LayerNorm.weight")}))
    assert Source.open(folder).read(["embed.norm.gain"])["embed.norm.gain"].shape == (33,)
    folder = save(pico("gpt2"), tmp_path / "gpt2")

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    rewrite(folder, strip)
    source = Source.open(folder)
    assert source.unused == ("h.0.attn.bias",)
    assert source.read(["blocks.0.attn.q.weight"])["blocks.0.attn.q.weight"].shape == (33, 33)


def test_shards_read_like_one_file(llama: Path) -> None:
    whole = Source.open(llama).block(1)
    before = {key: tensor.clone() for key, tensor in whole.items()}
    shard(llama)
    source = Source.open(llama)
    assert len(source.files) == 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in source.block(1).items())


def test_digest_depends_on_config_and_weights_only(llama: Path) -> None:
    first = Source.open(llama).digest()
    (llama / "notes.txt").write_text("x")
    assert Source.open(llama).digest() == first
    edit(llama, rms_norm_eps=1e-3)
    second = Source.open(llama).digest()
    rewrite(llama, lambda t: t["model.norm.weight"].mul_(2))
    assert len({first, second, Source.open(llama).digest()}) == 3
    assert len(first) == 64


def test_opening_reads_no_weights_and_reading_touches_only_what_is_asked(tmp_path: Path) -> None:
    """A tensor of NaN that nobody reads is nobody's error; the one who reads it is told its name."""
    folder = save(pico("llama"), tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda t: t[key].__setitem__((3, 2), float("nan")))
    source = Source.open(folder)
    source.block(0)
    with pytest.raises(CorruptWeights, match=rf"{key} \(blocks\.1\.mlp\.up\.weight\) .* NaN or infinity in 1 of 1554"):
        source.block(1)


def test_infinity_is_found_too(llama: Path) -> None:
    rewrite(llama, lambda t: t["model.norm.weight"].__setitem__(0, float("inf")))
    with pytest.raises(CorruptWeights, match=r"model\.norm\.weight"):
        Source.open(llama).block(None)


def test_unknown_tensor_names(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"no tensor 'blocks\.9\.attn\.q\.weight'"):
        Source.open(llama).read(["blocks.9.attn.q.weight"])


def test_real_models(shared: Path) -> None:
    found = {}
    for name in ("novel-llama-8m", "novel-neox-9m", "babyllama-1m"):
        source = Source.open(shared / "models" / name)
        found[name] = (source.anatomy.family, source.bytes_bf16(), source.anatomy.tied, source.dtype)
        assert len(source.tokenizer()) == source.config.vocab_size
    assert found == {
        "novel-llama-8m": ("llama", 15999488, True, torch.bfloat16),
        "novel-neox-9m": ("gpt_neox", 17866752, False, torch.bfloat16),
        "babyllama-1m": ("llama", 1872896, True, torch.float32),
    }
