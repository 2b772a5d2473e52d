"""Artifacts load as ordinary transformers models and compute what their codes say; a spoilt one is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import Choice, Made, choice, make, outputs
from pico import FAMILIES, batches, pico, save
from regauge.anatomy.model import Slot
from regauge.anatomy.storage import scatter
from regauge.artifact import files
from regauge.errors import ArtifactError, ModelError
from regauge.hosts.transformers.load import load
from regauge.kernels.cpu.library import available
from regauge.runtime.matrices.modules import PackedLinear, PackedLookup

INT4 = choice("int4-asym", "channel", "f32", "minmax")


def source(folder: Path, name: str, **changes: Any) -> tuple[Any, Path]:
    model = pico(name, **changes)
    return model, save(model, folder / "source")


def rebuilt(model: Any, made: Made) -> Any:
    """The source with the weights that the artifact stands for."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(scatter(made.source.anatomy, made.weights, shapes), strict=False)
    return model


@pytest.mark.parametrize("name", [*FAMILIES, "llama-tied", "bert-mlm", "vit-headless", "llama-headless"])
def test_every_family_computes_what_its_codes_stand_for(name: str, tmp_path: Path) -> None:
    model, path = source(tmp_path, name)
    made = make(path, tmp_path / "out", lambda site: INT4, prefer="regauge")
    loaded = load(made.path)
    assert type(loaded).__name__.removeprefix("Packed") == type(model).__name__
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    ids = batches(model)[0]
    # Activations are rounded to 16 bits a group: some 2e-5 of the largest, in every product.
    torch.testing.assert_close(outputs(loaded, ids), outputs(rebuilt(model, made), ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "gpt2", "mixtral", "vit"])
def test_sites_of_one_module_may_differ(name: str, tmp_path: Path) -> None:
    kinds: dict[str, Choice | None] = {
        "q": INT4,
        "k": choice("nf4"),
        "v": None,
        "gate": choice("int8"),
        "up": choice("fp8"),
        "down": choice("int3", lorc=2),
        "position": choice("int8"),
    }
    model, path = source(tmp_path, name)
    made = make(path, tmp_path / "out", lambda site: kinds.get(site.kind))
    assert made.wire.name == "regauge"
    ids = batches(model)[0]
    wanted = outputs(rebuilt(model, made), ids)
    torch.testing.assert_close(outputs(load(made.path), ids), wanted, rtol=1e-4, atol=1e-4)


def test_a_tied_table_is_held_once_and_read_by_both(tmp_path: Path) -> None:
    _, path = source(tmp_path, "llama-tied")
    loaded = load(make(path, tmp_path / "out", lambda site: INT4).path)
    assert type(loaded.model.embed_tokens) is PackedLookup
    assert type(loaded.lm_head) is PackedLinear
    assert loaded.lm_head.parts[0] is loaded.model.embed_tokens.matrix
    assert loaded.model.embed_tokens.weight.dtype == torch.float32
    with pytest.raises(ModelError, match=r"no weight to compute with \(add was asked of it\)"):
        loaded.lm_head.weight + torch.ones(1)


def test_it_generates_and_keeps_its_settings(tmp_path: Path) -> None:
    model, path = source(tmp_path, "llama")
    (path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "do_sample": False}))
    (path / "LICENSE").write_text("free")
    (path / "README.md").write_text("a card")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    made = make(path, tmp_path / "out", lambda site: INT4 if site.block is not None else None, prefer="regauge")
    loaded = load(made.path)
    tokens = loaded.generate(torch.tensor([[1, 2, 3]]), pad_token_id=0)
    assert tokens.shape == (1, 8)
    assert tokens.equal(rebuilt(model, made).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False))
    assert loaded.config.hidden_size == model.config.hidden_size
    assert loaded.generation_config.max_new_tokens == 5
    assert (made.path / "LICENSE").read_text() == "free"
    assert (made.path / "regauge" / "SOURCE_README.md").read_text() == "a card"
    assert (made.path / "chat_template.jinja").exists()


def test_what_moves_did_to_the_anatomy_is_loaded(tmp_path: Path) -> None:
    """A LayerNorm that became RMS, a bias gained, a head untied: none of it is in the source's classes."""
    _, path = source(tmp_path, "gpt2", tie_word_embeddings=True)
    from regauge.hosts.transformers.source import Source

    before = Source.open(path).anatomy
    norms = {norm.name: norm for norm in before.norms}
    norms["blocks.0.attn.norm"] = replace(norms["blocks.0.attn.norm"], kind="rms", source_kind="layer")
    anatomy = before.with_(tied=False, norms=tuple(norms.values()))
    made = make(path, tmp_path / "out", lambda site: INT4 if site.kind == "down" else None, anatomy=anatomy)
    assert made.wire.name == "regauge"
    assert any("norm of kind layer" in reason for reason in made.refusals)
    loaded = load(made.path)
    assert loaded.transformer.h[0].ln_1.kind == "rms"
    assert loaded.lm_head.weight.data_ptr() != loaded.transformer.wte.weight.data_ptr()
    assert loaded.config.tie_word_embeddings is False


def test_a_gained_bias_is_loaded(tmp_path: Path) -> None:
    _, path = source(tmp_path, "llama")
    from regauge.hosts.transformers.source import Source

    before = Source.open(path).anatomy
    slot = Slot("model.layers.0.mlp.up_proj.bias")
    sites = tuple(replace(s, bias=slot) if s.name == "blocks.0.mlp.up" else s for s in before.sites)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "blocks.0.mlp.up.weight" in tensors:
            tensors["blocks.0.mlp.up.bias"] = torch.arange(37.0)
        return tensors

    for site in ("blocks.0.mlp.up", "blocks.0.mlp.gate"):  # the module with the bias packed, and not
        made = make(path, tmp_path / site, {site: INT4}, anatomy=before.with_(sites=sites), change=change)
        assert any("gained or lost a bias" in reason for reason in made.refusals)
        assert load(made.path).model.layers[0].mlp.up_proj.bias.equal(torch.arange(37.0))


@pytest.mark.parametrize(("name", "wire"), [("llama", "regauge"), ("llama", "compressed-tensors"), ("phi3", "regauge")])
def test_a_file_of_a_whole_model_is_read_a_block_at_a_time(
    name: str, wire: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = source(tmp_path, name)
    made = make(path, tmp_path / "out", lambda site: choice("int8") if site.block is not None else None, prefer=wire)
    ids = torch.arange(7)[None]
    before = load(made.path)(ids).logits
    shards = sorted(made.path.glob("*.safetensors"))
    files.write(made.path / "whole", {key: tensor for shard in shards for key, tensor in files.read(shard).items()})
    for shard in shards:
        shard.unlink()
    (made.path / "whole").rename(made.path / f"{shards[0].name.partition('-')[0]}-00001-of-00001.safetensors")
    held: list[set[str]] = []
    read = files.read

    def watched(file: Path, names: set[str] | None = None) -> dict[str, torch.Tensor]:
        found = read(file, names)
        held.append({key.split("layers.")[-1].split("blocks.")[-1].split(".")[0] for key in found})
        return found

    monkeypatch.setattr(files, "read", watched)
    assert torch.equal(load(made.path)(ids).logits, before)
    assert sum({"0", "1"} <= blocks for blocks in held) == 0
    assert len(held) == 3


def test_a_plain_directory_simply_loads(tmp_path: Path) -> None:
    model, path = source(tmp_path, "qwen3")
    ids = batches(model)[0]
    assert outputs(load(path), ids).equal(outputs(model, ids))
    assert load(path, dtype=torch.bfloat16).dtype == torch.bfloat16
    weights = path / "model.safetensors"
    weights.rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load(path)


def test_bytes_are_packed_in_memory(tmp_path: Path) -> None:
    _, path = source(tmp_path, "llama", hidden_size=96, head_dim=16, intermediate_size=128)
    loaded = load(make(path, tmp_path / "out", lambda site: choice("int3"), prefer="regauge").path)
    layer = loaded.model.layers[0].mlp.up_proj.parts[0]
    by_torch = {"codes0": (128, 24), "codes1": (128, 12), "scale": (128, 1)}
    by_kernels = {"panels": (128 * 36,), "row_scale": (128,)}
    found = {name: tuple(b.shape) for name, b in layer.named_buffers()}
    assert found == (by_kernels if available() else by_torch)
    assert not [name for name, p in loaded.named_parameters() if p.dim() > 1]


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {}


def spoils(match: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    def keep(function: Callable[[Path], object]) -> Callable[[Path], object]:
        SPOILT[function.__name__] = (function, match)
        return function

    return keep


def edit(path: Path, **changes: Any) -> None:
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(raw))


def rewrite(path: Path, number: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    shard = sorted(path.glob("*.safetensors"))[number]
    tensors = files.read(shard)
    change(tensors)
    files.write(shard, tensors)


@spoils("format version 3 .* pip install -U regauge")
def newer(path: Path) -> None:
    edit(path, format_version=3)


@spoils("truncated")
def truncated(path: Path) -> None:
    shard = sorted(path.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])


@spoils("shards")
def shard_lost(path: Path) -> None:
    sorted(path.glob("*.safetensors"))[1].unlink()


@spoils("no regauge-")
def no_shards(path: Path) -> None:
    for shard in path.glob("*.safetensors"):
        shard.unlink()


@spoils(r"blocks.0.mlp.down do not fit 42 x 37")
def shape_contradicts(path: Path) -> None:
    rewrite(path, 1, lambda t: t.update({"blocks.0.mlp.down.codes": t["blocks.0.mlp.down.codes"][:, :-1].contiguous()}))


@spoils("do not fit")
def fewer_steps(path: Path) -> None:
    rewrite(path, 1, lambda t: t.update({"blocks.0.mlp.down.scale": t["blocks.0.mlp.down.scale"][:-1].contiguous()}))


@spoils(r"has shape \[41\], and the config asks for \[42\]")
def full_shape_contradicts(path: Path) -> None:
    rewrite(path, 3, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].contiguous()}))


@spoils("lacks the tensor model.norm.weight")
def tensor_lost(path: Path) -> None:
    rewrite(path, 3, lambda t: t.pop("model.norm.weight"))


@spoils("lacks the codes of blocks.0.mlp.down")
def codes_lost(path: Path) -> None:
    rewrite(path, 1, lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.0.mlp.down.")])


@spoils("do not fit")
def steps_lost(path: Path) -> None:
    rewrite(path, 1, lambda t: t.pop("blocks.0.mlp.down.scale"))


@spoils("quantised by 'hqq'")
def other_method(path: Path) -> None:
    edit(path, quant_method="hqq")


@spoils("header in config.json cannot be read")
def header_broken(path: Path) -> None:
    edit(path, weights=[{"at": ["blocks.0.mlp.down"]}])


@spoils("names 'blocks.9.mlp.down'")
def header_of_another_model(path: Path) -> None:
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"]["weights"][0]["at"].append("blocks.9.mlp.down")
    (path / "config.json").write_text(json.dumps(raw))


@spoils("of another package")
def header_names_foreign_code(path: Path) -> None:
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"]["weights"][0]["scale"] = {"part": "os.path:join"}
    (path / "config.json").write_text(json.dumps(raw))


@spoils("no config.json")
def no_config(path: Path) -> None:
    (path / "config.json").unlink()


@spoils("is not JSON")
def config_broken(path: Path) -> None:
    (path / "config.json").write_text("{")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoilt")
    path = save(pico("llama"), folder / "source")
    return make(path, folder / "out", lambda site: INT4 if site.block is not None else None, prefer="regauge").path


@pytest.mark.parametrize("how", list(SPOILT))
def test_a_spoilt_artifact_is_one_sentence(how: str, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(artifact, path)
    spoil, match = SPOILT[how]
    spoil(path)
    with pytest.raises(ArtifactError, match=match) as told:
        load(path)
    assert "\n" not in str(told.value)


def test_a_truncated_shard_is_found_before_anything_is_read(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(artifact, path)
    truncated(path)
    read: list[Path] = []
    monkeypatch.setattr(files, "read", read.append)
    with pytest.raises(ArtifactError, match="truncated"):
        load(path)
    assert not read
