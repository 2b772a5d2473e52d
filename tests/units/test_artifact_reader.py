"""An artifact as data: the same weights as the loaded model's, without a module and without a model library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import regauge.artifact
from artifacts import Choice, choice, make
from pico import FAMILIES, pico, save
from regauge.anatomy.model import Anatomy
from regauge.artifact.folder import ANATOMY, linear_modules
from regauge.artifact.reader import open_artifact
from regauge.errors import ArtifactError
from regauge.hosts.transformers.load import load
from regauge.hosts.transformers.skeleton import skeleton
from regauge.hosts.transformers.table import anatomy_of

OLD = Path(__file__).resolve().parents[1] / "fixtures" / "v1"
INT4, INT8 = choice("int4", "channel", "f32"), choice("int8", "channel", "f32", inputs="int8")


def in_blocks(how: Choice) -> Any:
    return lambda site: how if site.block is not None and site.kind != "router" else None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_block_by_block(name: str, tmp_path: Path) -> None:
    made = make(save(pico(name), tmp_path / "source"), tmp_path / "out", in_blocks(INT4), prefer="regauge")
    found = regauge.artifact.open(made.path)
    assert found.layout.anatomy == made.source.anatomy
    expected = dict(made.weights)
    if found.layout.anatomy.tied:
        del expected["head.weight"]
    for block in found.blocks():
        for site in block.codes:
            assert torch.equal(found.dense(block, site), expected.pop(f"{site}.weight"))
        for tensor, value in block.weights.items():
            assert torch.equal(value.float(), expected.pop(tensor)), tensor
    assert not expected


@pytest.mark.parametrize(("how", "wire"), [(INT8, "compressed-tensors"), (choice("nf4", "channel"), "regauge")])
def test_one_block_is_worth_what_the_loaded_model_has(how: Choice, wire: str, tmp_path: Path) -> None:
    made = make(save(pico("llama"), tmp_path / "source"), tmp_path / "out", in_blocks(how))
    found, model = open_artifact(made.path), load(made.path)
    assert found.wire.name == wire == made.wire.name
    block = found.block(1)
    for site in found.layout.anatomy.in_block(1):
        part = model.get_submodule(site.module).parts[0]
        assert torch.equal(found.dense(block, site.name), part.rows(0, site.shape[0]).float()), site.name
    assert torch.equal(block.weights["blocks.1.mlp.norm.gain"], model.model.layers[1].post_attention_layernorm.weight)


def test_terms_belong_to_the_matrix(tmp_path: Path) -> None:
    how = choice("int3", "channel", "bf16", lorc=2)
    made = make(save(pico("llama"), tmp_path / "source"), tmp_path / "out", in_blocks(how))
    found = open_artifact(made.path)
    dense = found.dense(found.block(0), "blocks.0.mlp.up")
    assert torch.equal(dense, made.weights["blocks.0.mlp.up.weight"])


def test_what_others_did_is_there_too(tmp_path: Path) -> None:
    made = make(save(pico("llama"), tmp_path / "source"), tmp_path / "out", in_blocks(INT4))
    found = open_artifact(made.path)
    assert found.recipe == "name: test\n"
    with pytest.raises(ArtifactError, match=r"receipt\.json is not a receipt that .* reads: regauge: Field required"):
        _ = found.receipt


def anatomy_then(folder: Path) -> Anatomy:
    import transformers

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del raw["quantization_config"]
    config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    model = skeleton(config)
    return anatomy_of(config, model).with_(tied=bool(model.all_tied_weights_keys))


@pytest.mark.parametrize("name", sorted(path.name for path in OLD.iterdir() if path.is_dir()))
def test_format_version_1_wants_an_anatomy(name: str) -> None:
    with pytest.raises(ArtifactError, match=r"does not say what its model is made of .* give anatomy="):
        open_artifact(OLD / name)
    found = open_artifact(OLD / name, anatomy_then(OLD / name))
    assert found.receipt is not None
    quantised = [site for block in found.blocks() for site in block.codes]
    assert sorted(quantised) == sorted(found.layout.quantised)


@pytest.mark.parametrize("name", FAMILIES)
def test_which_modules_are_linear_is_read_off_the_sites(name: str) -> None:
    model = pico(name)
    anatomy = anatomy_of(model.config, model)
    known = {path for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert linear_modules(anatomy) <= known
    routers = {site.module for site in anatomy.sites if site.kind == "router"}
    ours = {site.module for site in anatomy.sites}
    assert (known & ours) - linear_modules(anatomy) <= routers


def test_no_model_library_is_imported(tmp_path: Path) -> None:
    made = make(save(pico("qwen3"), tmp_path / "source"), tmp_path / "out", in_blocks(INT4))
    code = (
        "import sys, regauge.artifact\n"
        "assert 'torch' not in sys.modules\n"
        f"found = regauge.artifact.open({str(made.path)!r})\n"
        "assert len(list(found.blocks())) == 3\n"
        "print([m for m in ('transformers', 'compressed_tensors', 'regauge.hosts')"
        " if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SPOILT = {
    "is no mapping": lambda folder: (folder / ANATOMY).write_text("[]"),
    "anatomy.json cannot be read": lambda folder: (folder / ANATOMY).write_text('{"family": 3}'),
    "has no regauge-": lambda folder: [path.unlink() for path in folder.glob("*.safetensors")],
    "lacks the codes of": lambda folder: swap(folder),
    "the dtype": lambda folder: change(folder, dtype="int5"),
    "no quantization_config": lambda folder: change(folder, quantization_config=None),
    "which regauge does not read": lambda folder: change(folder, quantization_config={"quant_method": "gptq"}),
    "neither an artifact nor a model": lambda folder: (folder / "config.json").unlink(),
}


def change(folder: Path, **what: Any) -> None:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(raw | what), encoding="utf-8")


def swap(folder: Path) -> None:
    """The second block's file twice, and the third's not at all."""
    one, two = sorted(folder.glob("*.safetensors"))[1:3]
    shutil.copy(one, two)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("read")
    return make(save(pico("llama"), folder / "source"), folder / "out", in_blocks(INT4), prefer="regauge").path


@pytest.mark.parametrize("match", SPOILT)
def test_what_is_damaged_is_one_sentence(match: str, artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    SPOILT[match](folder)
    with pytest.raises(ArtifactError, match=match) as told:
        list(open_artifact(folder).blocks())
    assert "\n" not in str(told.value)


def test_a_pattern_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    made = make(save(pico("llama"), tmp_path / "source"), tmp_path / "out", in_blocks(INT8))
    raw = json.loads((made.path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    change(made.path, quantization_config=raw | {"ignore": ["re:model.(layers"]})
    with pytest.raises(ArtifactError, match=r"names modules by 'model\.\(layers', which is no pattern"):
        open_artifact(made.path)
