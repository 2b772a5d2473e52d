"""Sources: every bad model gives one clear sentence; good ones give back exactly what is stored."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regauge.errors import CorruptWeights, ModelError, UnknownArchitecture, UnsafeWeights
from regauge.hosts.transformers.checkpoint import read_header
from regauge.hosts.transformers.source import Source
from tests.pico import FAMILIES, PICOS, pico, save

WEIGHTS = "model.safetensors"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(pico("llama"), tmp_path / "llama")


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Splits the weights into two files with an index; returns its map."""
    tensors = load_file(folder / WEIGHTS)
    keys = sorted(tensors)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, some in halves.items():
        save_file({key: tensors[key] for key in some}, folder / name, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    index = {key: name for name, some in halves.items() for key in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


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


# Bad inputs


@pytest.mark.parametrize("spelling", ["/nowhere/at/all", "./models/nothing", "no/such/model/here"])
def test_no_such_directory(spelling: str) -> None:
    with pytest.raises(ModelError, match="there is no directory"):
        Source.open(spelling)


def test_a_mistyped_directory_gets_a_hint(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean 'llama'\?"):
        Source.open(llama.parent / "lama")


def test_a_hub_id_without_a_network_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"no directory some-org/some-model; .* not in the local cache"):
        Source.open("some-org/some-model")
    assert time.monotonic() - start < 5


def test_a_file_in_place_of_a_directory(llama: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the directory"):
        Source.open(llama / WEIGHTS)


def test_a_directory_without_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        Source.open(llama)
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge it into its base model"):
        Source.open(llama)


def test_a_config_that_is_not_json_or_names_no_type(llama: Path) -> None:
    edit(llama, model_type=None)
    with pytest.raises(ModelError, match="names no model_type"):
        Source.open(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        Source.open(llama)


def test_a_config_that_contradicts_itself(llama: Path) -> None:
    edit(llama, num_attention_heads=5)
    with pytest.raises(ModelError, match="transformers cannot read"):
        Source.open(llama)


def test_a_config_that_transformers_cannot_build(llama: Path) -> None:
    edit(llama, hidden_act="silo")
    with pytest.raises(ModelError, match=r"cannot build the model of .*config\.json \(KeyError"):
        Source.open(llama)


def test_an_unknown_architecture(llama: Path) -> None:
    edit(llama, model_type="mamba")
    with pytest.raises(UnknownArchitecture, match=r"families/mamba\.yaml"):
        Source.open(llama)
    edit(llama, model_type="llama", architectures=["LlamaForCausalML"])
    with pytest.raises(UnknownArchitecture, match="did you mean 'LlamaForCausalLM'"):
        Source.open(llama)


def test_a_config_that_names_no_class_gets_a_language_model_or_an_encoder(tmp_path: Path) -> None:
    for name, wanted in (("llama", "LlamaForCausalLM"), ("bert", "BertModel")):
        folder = save(pico(name), tmp_path / name)
        edit(folder, architectures=None)
        assert type(Source.open(folder).model).__name__ == wanted


def test_a_file_that_may_not_be_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Permission denied"):
        Source.open(llama)


def test_pickle_weights_only(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    with pytest.raises(UnsafeWeights, match=r"only pytorch_model\.bin.*save_pretrained"):
        Source.open(llama)


def test_no_weights_at_all(llama: Path) -> None:
    (llama / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="no weights"):
        Source.open(llama)


def test_remote_code(llama: Path) -> None:
    edit(llama, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    with pytest.raises(UnsafeWeights, match="code of its own"):
        Source.open(llama)


def test_a_source_that_is_quantised_already(llama: Path) -> None:
    edit(llama, quantization_config={"quant_method": "gptq", "bits": 4}, auto_map={"AutoConfig": "x.X"})
    with pytest.raises(ModelError, match=r"quantised already \(by gptq\)"):
        Source.open(llama)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_truncated_file(llama: Path, left: int) -> None:
    whole = (llama / WEIGHTS).read_bytes()
    (llama / WEIGHTS).write_bytes(whole[:left])
    with pytest.raises(CorruptWeights, match="cut off in its header" if 0 <= left < 200 else "truncated.*promises"):
        Source.open(llama)


def test_a_file_with_a_tail(llama: Path) -> None:
    with (llama / WEIGHTS).open("ab") as file:
        file.write(b"tail")
    with pytest.raises(CorruptWeights, match="too long"):
        Source.open(llama)


@pytest.mark.parametrize("header", [b"[1, 2]  ", b"\xff\xfe{}    ", b'{"a": 3}', b'{"a": {"dtype": "F32"}}'])
def test_a_corrupt_header(llama: Path, header: bytes) -> None:
    (llama / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CorruptWeights, match=r"header of .* is corrupt"):
        Source.open(llama)


def test_an_index_that_names_missing_files_or_tensors(llama: Path) -> None:
    index = shard(llama)
    (llama / "b.safetensors").rename(llama / "c.safetensors")
    with pytest.raises(CorruptWeights, match=r"names 2 files, and 1 of them are not there: b\.safetensors"):
        Source.open(llama)
    (llama / "c.safetensors").rename(llama / "b.safetensors")
    path = llama / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index | {"ghost": "a.safetensors"}}))
    with pytest.raises(CorruptWeights, match=r"ghost \(a\.safetensors\)"):
        Source.open(llama)
    path.write_text("[]")
    with pytest.raises(CorruptWeights, match="not an index of weights"):
        Source.open(llama)


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_tensors(name: str, tmp_path: Path) -> None:
    folder = save(pico(name), tmp_path)
    lost = next(key for key in read_header(folder / WEIGHTS) if "1" in key and "weight" in key)
    rewrite(folder, lambda t: t.__delitem__(lost))
    with pytest.raises(CorruptWeights, match="do not belong together"):
        Source.open(folder)


def test_a_tensor_of_another_shape(llama: Path) -> None:
    edit(llama, intermediate_size=41)
    with pytest.raises(CorruptWeights, match=r"shape \[42, 37\], and the config asks for \[42, 41\]"):
        Source.open(llama)


def test_a_tokenizer_is_missing_only_when_it_is_asked_for(llama: Path) -> None:
    source = Source.open(llama)
    with pytest.raises(ModelError, match=r"has no tokenizer .*copy the tokenizer files"):
        source.tokenizer()
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        source.tokenizer()


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
