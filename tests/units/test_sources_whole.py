"""Nothing of a source is dropped in silence, and nothing that a config names is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import regauge as rg
from checkpoints import WEIGHTS, edit
from pico import pico, save
from regauge.errors import ArtifactError, CorruptWeights, ModelError, RegaugeError, SettingError, UnknownArchitecture
from regauge.hosts.transformers.source import Source

INDEX = "model.safetensors.index.json"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(pico("llama"), tmp_path / "llama")


def add(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / WEIGHTS
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


def test_tensors_without_a_place_are_named(llama: Path) -> None:
    add(llama, **{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)})
    notes = " ".join(Source.open(llama).anatomy.notes)
    assert "1 tensors of the files have no place" in notes
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in notes


def test_layers_beyond_the_config_are_named(llama: Path) -> None:
    blocks = Source.open(llama).anatomy.blocks
    edit(llama, num_hidden_layers=blocks - 1)
    assert f"model.layers.{blocks - 1}." in " ".join(Source.open(llama).anatomy.notes)


def test_what_old_checkpoints_are_known_to_hold_is_no_news(tmp_path: Path) -> None:
    bert = save(pico("bert"), tmp_path / "bert")
    add(bert, **{"bert.embeddings.position_ids": torch.arange(4)[None]})
    assert not any("no place" in note for note in Source.open(bert).anatomy.notes)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv", ".scale"])
def test_codes_with_steps_beside_them_are_no_weights(llama: Path, dtype: torch.dtype, suffix: str) -> None:
    key = "model.layers.0.self_attn.q_proj.weight"
    weight = load_file(llama / WEIGHTS)[key]
    add(llama, **{key: weight.to(dtype), key + suffix: torch.ones(1)})
    with pytest.raises(ModelError, match=r"is stored as codes .* with their steps beside them"):
        Source.open(llama)


def test_a_single_file_goes_before_a_leftover_index(llama: Path) -> None:
    (llama / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}), encoding="utf-8")
    assert [path.name for path in Source.open(llama).files] == [WEIGHTS]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "..", "", "a/b.safetensors", "a\\b", 7, None, []]
)
def test_an_index_names_files_of_its_own_folder(name: object, llama: Path) -> None:
    (llama / WEIGHTS).rename(llama.parent / "x.safetensors")
    (llama / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}), encoding="utf-8")
    with pytest.raises(CorruptWeights, match="no file of that folder"):
        Source.open(llama)


def test_links_that_lead_nowhere_are_named(llama: Path) -> None:
    (llama / "tokenizer.json").symlink_to("nowhere")
    assert "tokenizer.json is a link that leads nowhere (nowhere)" in " ".join(Source.open(llama).anatomy.notes)


OTHERS = [name for name in sorted(dir(transformers)) if not name.startswith("_")][::60]


@pytest.mark.parametrize(
    "name", [*OTHERS, "set_seed", "logging", "LlamaConfig", "AutoModel", "Trainer", 7, None, [], "os.system"]
)
def test_architectures_names_a_model_of_the_type_and_nothing_else(
    name: object, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(llama, architectures=[name])
    monkeypatch.setattr(transformers, "set_seed", lambda *_: pytest.fail("it was called"))
    with pytest.raises((UnknownArchitecture, ModelError)):
        Source.open(llama)


def test_the_same_of_an_artifact(llama: Path, tmp_path: Path) -> None:
    rg.apply("nf4", llama, tmp_path / "out")
    for name in ("set_seed", "LlamaConfig", "AutoModel", "Trainer", "BertForMaskedLM"):
        edit(tmp_path / "out", architectures=[name])
        with pytest.raises(UnknownArchitecture, match=name):
            rg.load(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "7"])
def test_generation_settings_that_cannot_be_read(text: str, llama: Path, tmp_path: Path) -> None:
    rg.apply("nf4", llama, tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"generation_config\.json cannot be read"):
        rg.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16, "float32", "float64"])
def test_a_dtype_may_be_named(dtype: str | torch.dtype, llama: Path, tmp_path: Path) -> None:
    rg.apply("rtn-w8", llama, tmp_path / "out")
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert {rg.load(path, dtype=dtype).dtype for path in (llama, tmp_path / "out")} == {wanted}
    assert {rg.load(path, dtype="auto").dtype for path in (llama, tmp_path / "out")} == {Source.open(llama).dtype}


def test_dtypes_that_models_do_not_compute_in(llama: Path, tmp_path: Path) -> None:
    rg.apply("rtn-w8", llama, tmp_path / "out")
    for path in (llama, tmp_path / "out"):
        with pytest.raises(SettingError, match=r"dtype 'bfloat1' \(did you mean 'bfloat16'\?\)"):
            rg.load(path, dtype="bfloat1")
        edit(path, dtype="float8_e4m3fn")
        with pytest.raises(RegaugeError):
            rg.load(path)


def test_a_config_without_a_dtype_keeps_the_sources(tmp_path: Path) -> None:
    folder = save(pico("llama").to(torch.bfloat16), tmp_path / "bf16")
    edit(folder, dtype=None, torch_dtype=None)
    rg.apply("rtn-w8", folder, tmp_path / "out")
    assert rg.load(tmp_path / "out").dtype == rg.load(folder).dtype == torch.bfloat16


def test_values_that_the_dtype_cannot_hold_are_named(tmp_path: Path) -> None:
    model = pico("llama").to(torch.bfloat16)
    model.model.norm.weight.data[0] = 1e5
    folder = save(model, tmp_path / "big")
    rg.apply("rtn-w8", folder, tmp_path / "out")
    with pytest.raises(
        ArtifactError, match=r"model\.norm\.weight has values up to 9\.98e\+04, which float16 cannot hold"
    ):
        rg.load(tmp_path / "out", dtype="float16")
    with pytest.raises(ModelError, match=r"model\.norm\.weight of .* has values that float16 cannot hold"):
        rg.load(folder, dtype="float16")


def test_a_tensor_that_no_module_takes_is_not_left_out(llama: Path, tmp_path: Path) -> None:
    rg.apply("rtn-w8", llama, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2)}, shard, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.lora_A, for which"):
        rg.load(tmp_path / "out")


def test_a_padding_token_beyond_the_table(llama: Path) -> None:
    rows = Source.open(llama).config.vocab_size
    edit(llama, pad_token_id=rows)
    with pytest.raises(ModelError, match=rf"pad_token_id {rows}, and the model's table has {rows} rows"):
        Source.open(llama)
