"""Sources in FP8 with steps a block and in MXFP4: read by decoding, and the receipt says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import regauge as rg
from regauge.errors import CorruptWeights, ModelError
from regauge.hosts.transformers.coded import decode
from regauge.hosts.transformers.source import Source
from tests.architectures import build, inputs
from tests.units.test_architectures import apart, run


def test_fp8_by_hand() -> None:
    """Two rows share a step, and two columns."""
    codes = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.5, 16.0], [3.0, 1.0, 2.0]]).to(torch.float8_e4m3fn)
    steps = torch.tensor([[2.0, 10.0], [0.5, 1.0]])
    assert decode(codes, steps).tolist() == [[2.0, 4.0, 40.0], [16.0, 1.0, 160.0], [1.5, 0.5, 2.0]]
    assert decode(codes, torch.tensor([2.0])).tolist()[0] == [2.0, 4.0, 8.0]


def test_mxfp4_by_hand_and_as_transformers_decodes_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[..., 0], blocks[..., 1] = 0x21, 0xF9  # 0.5, 1; -0.5, -6
    found = decode(blocks, torch.full((1, 1, 1), 128, dtype=torch.uint8))
    assert found[0, :4, 0].tolist() == [1.0, 2.0, -1.0, -12.0]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 130, (3, 10, 2), generator=generator, dtype=torch.uint8)
    assert torch.equal(decode(blocks, scales), convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(decode(blocks[1], scales[1]), decode(blocks, scales)[1])


def as_fp8(folder: Path, block: int = 16) -> int:
    """Rewrites the matrices of a checkpoint's blocks as FP8 with a step a block; how many there were."""
    tensors, many = load_file(folder / "model.safetensors"), 0
    for key, w in list(tensors.items()):
        if ".layers." in key and key.endswith("proj.weight"):
            steps = torch.zeros(-(-w.shape[0] // block), -(-w.shape[1] // block))
            codes = torch.empty_like(w)
            for i in range(steps.shape[0]):
                for j in range(steps.shape[1]):
                    at = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
                    steps[i, j] = w[at].abs().max() / 448
                    codes[at] = w[at] / steps[i, j]
            tensors[key], tensors[f"{key}_scale_inv"] = codes.to(torch.float8_e4m3fn), steps
            many += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config))
    return many


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_an_fp8_checkpoint_is_read_by_decoding(name: str, tmp_path: Path) -> None:
    """DeepSeek's experts are codes too, one by one in the file and one stack in the model."""
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    given, before = inputs(model), run(model, inputs(model))
    many = as_fp8(tmp_path / "model")
    receipt = rg.apply("rtn-w8", tmp_path / "model", out=tmp_path / "out")
    said = f"{many} tensors of the source are stored as FP8 numbers with steps: they were read by decoding"
    assert said in receipt.notes
    plain = rg.load(tmp_path / "model")
    assert 1e-3 < apart(run(plain, given), before) < 0.12, "FP8 rounds, and is what was read"
    assert apart(run(rg.load(tmp_path / "out"), given), run(plain, given)) < 0.03
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] != "fp8"


def test_an_mxfp4_checkpoint_is_read_by_decoding(tmp_path: Path) -> None:
    model: Any = build("gpt_oss", hidden_size=64, intermediate_size=32)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, wide, rows = tensors.pop(key).shape
        blocks = torch.randint(256, (experts, rows, wide // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 124, (experts, rows, wide // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        model.get_parameter(key).data = decode(blocks, scales).float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    given = inputs(model)
    assert apart(run(rg.load(folder), given), run(model, given)) < 1e-5
    receipt = rg.apply("rtn-w8", folder, out=tmp_path / "out")
    assert any("stored as MXFP4: they were read by decoding" in note for note in receipt.notes)
    assert apart(run(rg.load(tmp_path / "out"), given), run(model, given)) < 0.05


def test_codes_without_steps_and_steps_without_codes_are_refused(tmp_path: Path) -> None:
    build("qwen3").save_pretrained(tmp_path)
    as_fp8(tmp_path)
    tensors: dict[str, Any] = dict(load_file(tmp_path / "model.safetensors"))
    key = "model.layers.0.mlp.up_proj.weight"
    for wrong, why in [
        ({key: None}, "holds the steps"),
        ({f"{key}_scale_inv": None}, "stored as codes without steps"),
        ({f"{key}_scale_inv": torch.ones(7, 9)}, "do not fit"),
    ]:
        made = {name: tensor for name, tensor in (tensors | wrong).items() if tensor is not None}
        save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CorruptWeights, match=why):
            Source.open(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised already \(by awq\)"):
        Source.open(tmp_path)
