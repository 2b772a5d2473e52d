"""Gains of a member: what its blocks add comes near to what the whole would have made."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regauge as rg
from regauge.artifact.gains import FILE, gains_bytes, read_gains
from regauge.engine import apply
from regauge.engine.extracting import extract
from regauge.errors import ArtifactError
from regauge.plan import parse
from tests import tiny

IDS = torch.randint(3, 250, (4, 48), generator=torch.Generator().manual_seed(0), dtype=torch.int64, device="cpu")
FAMILY = "name: f\nfamily: {ffn: [0.5], depth: [3], order: none}\n"
WEIGHTS = "weights: {blocks.*.mlp.down: {grid: int4, grain: group:16, ranger: absmax, scale: f16, rounder: nearest}}\n"
ASYM = (
    "weights: {blocks.*.mlp.down: {grid: int3-asym, grain: group:32, ranger: absmax, scale: f32, rounder: nearest}}\n"
)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose neurons are there twice, so that half of them add half as much."""
    from transformers import AutoModelForCausalLM

    source = tiny.folder(tmp_path_factory.mktemp("twins"), num_hidden_layers=4, intermediate_size=128)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight[64:] = matrix.weight[:64]
            layer.mlp.down_proj.weight[:, :64] *= 4
            layer.mlp.down_proj.weight[:, 64:] = layer.mlp.down_proj.weight[:, :64]
    model.save_pretrained(source)
    return source


@torch.no_grad()
def run(model: Any, subnet: str = "") -> Tensor:
    """Logits of a member, or of what was loaded."""
    with rg.use(model, subnet) if subnet else nullcontext():
        return model(input_ids=IDS, use_cache=False).logits


def test_what_is_missing_is_made_up_for(twins: Path, tmp_path: Path) -> None:
    apply(parse(FAMILY), twins, tmp_path / "out")
    model = rg.load(tmp_path / "out", dtype="float32")
    whole, without = run(model), run(model, "ffn=0.5")
    gains = model.regauge.fit("ffn=0.5", model, IDS)
    assert set(gains) == {f"blocks.{block}.{name}" for block in range(4) for name in ("attn.o", "mlp.down")}
    for name, gain_O in gains.items():
        assert torch.allclose(gain_O, torch.full_like(gain_O, 2.0 if "down" in name else 1.0), atol=1e-2)
    size = whole.abs().max()
    assert (run(model, "ffn=0.5") - whole).abs().max() < 1e-4 * size
    assert (without - whole).abs().max() > 0.01 * size
    assert torch.equal(run(model), whole)
    model.regauge.forget_gains(model.regauge.settled("ffn=0.5"))
    assert torch.equal(run(model, "ffn=0.5"), without)


@pytest.mark.parametrize("weights", ["", WEIGHTS, ASYM])
def test_a_member_with_gains_is_the_same_wherever_it_runs(twins: Path, tmp_path: Path, weights: str) -> None:
    out = tmp_path / "out"
    apply(parse(FAMILY + weights), twins, out)
    model = rg.load(out, dtype="float32")
    kept, plain = {}, {}
    for subnet in ("ffn=0.5", "depth=3"):
        plain[subnet] = run(model, subnet)
        kept[subnet] = model.regauge.fit(subnet, model, IDS)
    (out / FILE).write_bytes(gains_bytes(kept))
    again = rg.load(out, dtype="float32")
    for subnet in kept:
        within = run(model, subnet)
        assert not torch.equal(within, plain[subnet])
        assert torch.equal(run(again, subnet), within)
        assert torch.equal(run(rg.load(out, subnet=subnet, dtype="float32")), within)
        extract(out, subnet, tmp_path / subnet)
        assert torch.equal(run(rg.load(tmp_path / subnet, dtype="float32")), within)
        how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = IDS[:1, :8]
        alone = rg.load(tmp_path / subnet, dtype="float32").generate(ids, **how)
        assert torch.equal(model.generate(ids, subnet=subnet, **how), alone)


def test_a_damaged_file_is_a_sentence(twins: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    apply(parse(FAMILY), twins, out)
    anatomy = rg.load(out, dtype="float32").regauge.anatomy
    assert read_gains(out, anatomy) == {}
    for site, gain_O in (
        ("blocks.9.mlp.down", torch.ones(8, dtype=torch.float32, device="cpu")),
        ("blocks.0.mlp.down", torch.ones(4096, dtype=torch.float32, device="cpu")),
        ("blocks.0.mlp.down", torch.ones(8, dtype=torch.float64, device="cpu")),
        ("blocks.0.mlp.down", torch.full((8,), torch.inf, dtype=torch.float32, device="cpu")),
    ):
        (out / FILE).write_bytes(gains_bytes({"ffn=0.5": {site: gain_O}}))
        with pytest.raises(ArtifactError, match="does not fit the model"):
            rg.load(out)
    (out / FILE).write_bytes(b"none")
    with pytest.raises(ArtifactError):
        rg.load(out)
