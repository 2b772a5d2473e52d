"""Models whose blocks differ, through an artifact: header, shards, modules resized, packed modules, the step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.anatomy.model import Anatomy, Weights
from regauge.errors import ArtifactError
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.skeleton import body_prefix, skeleton
from regauge.hosts.transformers.source import Source
from regauge.hosts.transformers.tables import table_for
from regauge.kernels.cpu.library import available
from tests.artifacts import outputs
from tests.pico import PICOS, batches, pico, save
from tests.sizes import cut
from tests.units.test_step import difference


def expected(made: Any, anatomy: Anatomy, batch: Tensor) -> Tensor:
    """What the canonical tensors give, streamed."""

    def weights(block: int | None) -> Weights:
        return {name: made.weights[name] for name in anatomy.slots(block) if name in made.weights}

    with torch.no_grad():
        return next(Runner(made.source, anatomy=anatomy).logits([batch], weights)).float()


@pytest.mark.parametrize("form", ["full", "int4"])
@pytest.mark.parametrize("kind", ["ffn", "heads", "residual"])
@pytest.mark.parametrize("name", PICOS)
def test_every_family_loads_in_other_sizes(name: str, kind: str, form: str, tmp_path: Path) -> None:
    if (
        kind == "residual"
        and "select" in Source.open(save(pico(name), tmp_path / "look")).anatomy.stream("residual").stops
    ):
        pytest.skip("the channels of this residual are fixed")
    found = cut(tmp_path, name, kind, form)
    model, made, anatomy = found.model, found.made, found.anatomy
    loaded = load(made.path, activations="float32")
    loaded.config._experts_implementation = "eager"  # the default, a grouped kernel, wants rows of 16 bytes
    batch = batches(model)[0].float() if model.main_input_name == "pixel_values" else batches(model)[0]
    wanted = expected(made, anatomy, batch)
    ours = outputs(loaded, batch)
    assert ours.shape == wanted.shape
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < 2e-5


def test_the_header_lists_sizes_by_place(tmp_path: Path) -> None:
    found = cut(tmp_path, "llama", "heads", "nf4")
    made, anatomy = found.made, found.anatomy
    raw = json.loads((made.path / "config.json").read_text())
    assert raw["num_attention_heads"] == 6  # the source's: stock classes read it, and have no number for each block
    sizes = raw["quantization_config"]["sizes"]
    assert sizes["blocks.0.attn.q"] == [40, 42]
    assert sizes["blocks.0.attn.o"] == [42, 40]
    assert "blocks.0.mlp.up" not in sizes
    assert load(made.path).model.layers[0].self_attn.k_proj.out_features == 20
    assert anatomy.attentions[0].kv_heads == 2  # type: ignore[union-attr]  # it has attention


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"blocks.0.mlp.up": [36]}, "a matrix has two, both above 0"),
        ({"blocks.0.mlp.up": [36, 0]}, "a matrix has two, both above 0"),
        ({"blocks.0.mlp.up": "36x42"}, "sizes of 'blocks.0.mlp.up'"),
        ({"blocks.7.mlp.up": [36, 42]}, "'blocks.7.mlp.up', which a model of this config has not"),
        ({"blocks.0.mlp.up": [20, 42]}, "the sizes in the header do not fit together: blocks.0.mlp.gate writes 36"),
        ({"blocks.0.attn.k": [20, 42]}, "which is no grouping"),
    ],
)
def test_sizes_that_others_wrote_are_checked(sizes: dict[str, Any], why: str, tmp_path: Path) -> None:
    made = cut(tmp_path, "llama", "ffn", "nf4").made
    path = made.path / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"]["sizes"] |= sizes
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=why):
        load(made.path)


@pytest.mark.parametrize("name", PICOS)
def test_every_size_that_a_table_lists_is_an_attribute_of_some_block(name: str) -> None:
    config = pico(name).config
    table, model = table_for(config), skeleton(config)
    blocks = model.get_submodule(f"{body_prefix(model)}{table.blocks}")
    for path in table.sizes:
        assert any(isinstance(follow(block, path), int) for block in blocks), path


def follow(module: Any, path: str) -> Any:
    for step in path.split("."):
        module = getattr(module, step, None)
    return module


def test_without_its_sizes_an_artifact_does_not_load(tmp_path: Path) -> None:
    for form in ("full", "nf4"):
        made = cut(tmp_path / form, "llama", "ffn", form).made
        path = made.path / "config.json"
        raw = json.loads(path.read_text())
        raw["quantization_config"]["sizes"] = {}
        path.write_text(json.dumps(raw))
        with pytest.raises(ArtifactError, match=r"do not fit|has shape \[42, 36\], and the config asks for \[42, 37\]"):
            load(made.path)


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"])
def test_the_step_serves_blocks_of_other_widths(name: str, tmp_path: Path) -> None:
    made = cut(tmp_path, name, "ffn", "nf4").made
    assert difference(rg.load(made.path, activations="float32"), batch=2) < 3e-6


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "qwen3"])
def test_the_step_serves_blocks_of_other_heads(name: str, tmp_path: Path) -> None:
    made = cut(tmp_path, name, "heads", "nf4").made
    assert difference(rg.load(made.path, activations="float32"), batch=2) < 3e-6


def test_a_cut_model_generates_and_runs_in_a_window(tmp_path: Path) -> None:
    made = cut(tmp_path, "llama", "ffn", "nf4").made
    model, small = rg.load(made.path), rg.load(made.path, memory="2MB")
    ids = torch.arange(7)[None]
    kwargs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **kwargs), small.generate(ids, **kwargs))
