"""Nothing of a source is dropped in silence, and nothing that a config names is called."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import regauge as rg
from checkpoints import WEIGHTS, edit
from pico import FAMILIES, pico, save
from regauge.artifact.config import left_behind
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


STEPS = (
    "q_proj.weight_scale", "q_proj.weight_scale_inv", "q_proj.weight.scale", "q_proj.scale", "q_proj.scale_weight",
    "q_proj.input_scale", "q_proj.weight.absmax", "q_proj.weight.quant_map", "q_proj.SCB", "q_proj.weight_zero_point",
    "q_scale",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("name", STEPS)
def test_codes_with_steps_beside_them_are_no_weights(llama: Path, dtype: torch.dtype, name: str) -> None:
    stem = "model.layers.0.self_attn."
    weight = load_file(llama / WEIGHTS)[f"{stem}q_proj.weight"]
    add(llama, **{f"{stem}q_proj.weight": weight.to(dtype), stem + name: torch.ones(1)})
    with pytest.raises(ModelError, match=r"q_proj\.weight .* is stored as codes .* with their steps beside them"):
        Source.open(llama)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(llama: Path, dtype: torch.dtype) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    add(llama, **{key: load_file(llama / WEIGHTS)[key].to(dtype)})
    with pytest.raises(ModelError, match=r"down_proj\.weight .* is stored as codes \(\w+\), and config\.json has no"):
        Source.open(llama)


def deep(model: Path) -> tuple[str, str, list[str]]:
    """Of a checkpoint: what the keys of its first block begin with, those of the one behind the last, and all keys."""
    keys = sorted(load_file(model / WEIGHTS))
    block = re.compile(r"^(.*?\.?)(\d+)\.")
    stems = {found[1] for key in keys if (found := block.match(key))}
    (stem,) = (s for s in stems if f"{s}0." in keys[0] or any(key.startswith(f"{s}0.") for key in keys))
    count = 1 + max(int(found[2]) for key in keys if (found := block.match(key)))
    return f"{stem}0.", f"{stem}{count}.", keys


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_in_a_file_vanishes_whatever_its_place(name: str, tmp_path: Path) -> None:
    """For each family: a tensor beside every module, a layer more, adapters, steps beside weights in full precision."""
    model = save(pico(name), tmp_path / "model")
    first, beyond, keys = deep(model)
    modules = sorted({key.rpartition(".")[0] for key in keys})
    matrices = [key for key in keys if key.startswith(first) and key.endswith(".weight")]
    strange = {
        *("extra", "model.extra.weight", "lm_head.extra", "base_model.model.extra.weight"),
        *(f"{module}.extra" for module in modules),
        *(f"{key.removesuffix('weight')}lora_A.weight" for key in matrices),
        *(f"{key}_scale" for key in matrices),
        *(beyond + key.removeprefix(first) for key in keys if key.startswith(first)),
    } - set(keys)
    add(model, **{key: torch.ones(2, 2) for key in strange})
    found = Source.open(model)
    assert set(found.unused) == strange
    told = f"{len(strange)} tensors of the files have no place in config.json's model and are left out: "
    assert told + ", ".join(sorted(strange)[:3]) in " ".join(found.anatomy.notes)


def test_a_tensor_under_two_names_is_refused(llama: Path) -> None:
    add(llama, **{"layers.0.mlp.down_proj.weight": load_file(llama / WEIGHTS)["model.layers.0.mlp.down_proj.weight"]})
    with pytest.raises(CorruptWeights, match=r"holds model\.layers\.0\.mlp\.down_proj\.weight twice"):
        Source.open(llama)


def test_what_a_head_has_beside_it_is_named(tmp_path: Path) -> None:
    """A pooler that a masked language model has no use for: transformers leaves it out without a word."""
    bert = save(pico("bert-mlm"), tmp_path / "bert")
    add(bert, **{"bert.pooler.dense.weight": torch.ones(33, 33)})
    assert "left out: bert.pooler.dense.weight" in " ".join(Source.open(bert).anatomy.notes)


def test_an_adapter_beside_a_model_is_refused(llama: Path) -> None:
    (llama / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}', encoding="utf-8")
    with pytest.raises(ModelError, match="transformers would load the base model that the adapter names"):
        Source.open(llama)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_a_config_is_carried_over(name: str, tmp_path: Path) -> None:
    model = save(pico(name), tmp_path / "model")
    edit(model, a_field_of_its_own={"deep": [1, None, "x"]}, pad_token_id=0, bos_token_id=3, torchscript=True)
    before = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for wire in (None, "regauge") if name == "llama" else (None,):
        out = tmp_path / f"out-{wire}"
        rg.apply("rtn-w8", model, out, wire=wire)
        after = json.loads((out / "config.json").read_text(encoding="utf-8"))
        changed = {key for key in before if after.get(key) != before[key]}
        assert changed <= {"tie_word_embeddings", "dtype"}
        new = {"quantization_config", "auto_map", "transformers_weights", "tie_word_embeddings", "dtype"}
        assert after.keys() - before.keys() <= new


def test_files_that_are_not_carried_over_are_named(llama: Path, tmp_path: Path) -> None:
    given = {
        "modules.json": json.dumps([{"idx": 0, "name": "0", "path": "", "type": "a.Transformer"},
                                    {"idx": 1, "name": "1", "path": "2_Dense", "type": "a.b.Dense"},
                                    {"idx": 2, "name": "2", "path": "deep/3_Other", "type": "a.b.Other"}]),
        "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "weights", "2_Dense/pytorch_model.bin": "pickle",
        "2_Dense/code.py": "code", "deep/3_Other/inner/x.json": "{}", "onnx/model.onnx": "x", "training_args.bin": "x",
        "consolidated.safetensors": "x", ".gitattributes": "x", "LICENSE": "free", "modeling_mine.py": "x",
    }  # fmt: skip
    for name, content in given.items():
        (llama / name).parent.mkdir(parents=True, exist_ok=True)
        (llama / name).write_text(content, encoding="utf-8")
    receipt = rg.apply("nf4", llama, tmp_path / "out")
    (note,) = [note for note in receipt.notes if note.startswith("not carried over from llama")]
    assert "consolidated.safetensors, modeling_mine.py, onnx/, training_args.bin, …" in note
    assert left_behind(llama, [WEIGHTS])[4:] == ["2_Dense/code.py", "2_Dense/pytorch_model.bin"]
    made = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    carried = {
        "modules.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "deep/3_Other/inner/x.json",
        "LICENSE",
    }
    assert carried <= made
    assert not any(name.endswith((".bin", "code.py", ".onnx")) for name in made)
    rg.apply("nf4", llama, tmp_path / "out", force=True)  # all of it is ours, so it may go


@pytest.mark.parametrize("content", ["{", "7", "{}", "[7]", "[[]]", '[{"path": 1, "type": "x"}]', '[{"type": "x"}]',
                                     '[{"path": "../x", "type": "x"}]', '[{"path": "/etc", "type": "x"}]',
                                     '[{"path": "a/../../b", "type": "x"}]', '[{"path": "~", "type": "x"}]',
                                     '[{"path": "a\\\\b", "type": "x"}]'])  # fmt: skip
def test_modules_lie_in_the_folder(content: str, llama: Path) -> None:
    (llama / "modules.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"modules\.json is no list of a sentence encoder's modules"):
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


OTHERS = [name for name in sorted(transformers.__all__) if not name.startswith("_")][::60]  # dir() grows as it is used


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
    with pytest.raises(ArtifactError, match=r"generation_config\.json is (not JSON|no mapping but)"):
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


@pytest.mark.parametrize("inner", ["model.safetensors", "config.json", ""])
def test_a_module_that_is_a_link_out_of_the_folder_is_refused(inner: str, llama: Path, tmp_path: Path) -> None:
    """Nothing from elsewhere is copied into an artifact."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x").write_text("mine", encoding="utf-8")
    (llama / "modules.json").write_text('[{"path": "deep/2_Dense", "type": "x.Dense"}]', encoding="utf-8")
    module = llama / "deep" / "2_Dense"
    (module if inner else module.parent).mkdir(parents=True)
    (module / inner).symlink_to(tmp_path / "secret" / ("x" if inner else ""))
    with pytest.raises(ModelError, match="is a link out of its folder"):
        Source.open(llama)
