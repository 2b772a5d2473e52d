"""Residual networks: convolutions as sites, batch norms folded, and what an artifact of one gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import regauge as rg
from regauge.anatomy.moves import Move, apply, transform
from regauge.engine import apply as build
from regauge.engine.renorming import TOLD
from regauge.errors import MoveError, RecipeError, RegaugeError, SettingError, TextError
from regauge.hosts.regauge.configuration_resnet import ResNetConfig, deep
from regauge.hosts.regauge.modeling_resnet import BatchNorm, recalibrate
from regauge.hosts.transformers.runner import Runner
from regauge.hosts.transformers.source import Source
from regauge.plan import diff, digest, dump, parse
from regauge.plan.combining import combined
from toy_resnet import SIZES, images, pixels, saved, toy

ROW = "{grid: %s, grain: channel, ranger: absmax, scale: f32, rounder: %s}"
FOLD = "rewrites: [fold-batch-norm]\n"


def recipe(grid: str = "int8", rounder: str = "nearest", more: str = FOLD) -> str:
    return f"name: folded\n{more}weights: {{blocks.*: {ROW % (grid, rounder)}}}\n"


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels()).logits  # type: ignore[operator]


def test_sizes_of_the_published_ones() -> None:
    assert (len(deep(3).layer_widths), len(deep(9).layer_widths)) == (9, 27)  # 2 convolutions each, and 2 layers more
    assert deep(3).layer_strides == [1, 1, 1, 2, 1, 1, 2, 1, 1]


def test_a_convolution_is_a_matrix_over_what_each_place_reads(tmp_path: Path) -> None:
    source = Source.open(saved(tmp_path / "m"))
    up, down = (source.anatomy.site(f"blocks.2.mlp.{kind}") for kind in ("up", "down"))
    assert (up.shape, up.window) == ((9, 45), 9)
    assert (down.shape, down.window) == ((11, 81), 9)
    (reader,) = source.anatomy.stream("blocks.2.ffn").readers
    assert (reader.tensor, reader.axis, reader.width) == ("blocks.2.mlp.down.weight", 1, 9)


def test_statistics_see_what_each_place_reads_with_zeros_at_the_edges(tmp_path: Path) -> None:
    """A site's inputs times its matrix are its outputs, place by place."""
    source = Source.open(saved(tmp_path / "m"))
    runner = Runner(source)
    states = runner.begin([pixels()], source.block(None))
    for block in (0, 1, 2):
        shown: list[torch.Tensor] = []
        name = f"blocks.{block}.mlp.up"
        weights = source.block(block)
        after = runner.block(block, weights, states, watch={name: shown.append})
        conv = toy().blocks[block].conv1
        expected = torch.nn.functional.conv2d(states.hidden[0], weights[f"{name}.weight"].view(conv.weight.shape),
                                              stride=conv.stride, padding=1)  # fmt: skip
        found = (shown[0] @ weights[f"{name}.weight"].T).view(3, -1, expected.shape[1]).transpose(1, 2)
        torch.testing.assert_close(found.reshape(expected.shape), expected)
        states = after


def test_a_changed_input_of_overlapping_places_changes_the_convolution(tmp_path: Path) -> None:
    source = Source.open(saved(tmp_path / "m"))
    runner = Runner(source)
    states = runner.begin([pixels()], source.block(None))
    weights = source.block(2)
    same = runner.block(2, weights, states, inputs={"blocks.2.mlp.up": lambda x: x.clone()})
    torch.testing.assert_close(same.hidden[0], runner.block(2, weights, states).hidden[0])
    doubled = {**weights, "blocks.2.mlp.up.weight": 2 * weights["blocks.2.mlp.up.weight"]}
    twice = runner.block(2, weights, states, inputs={"blocks.2.mlp.up": lambda x: 2 * x})
    torch.testing.assert_close(twice.hidden[0], runner.block(2, doubled, states).hidden[0])
    out = runner.block(2, weights, states, outputs={"blocks.2.mlp.up": lambda y: 2 * y})
    torch.testing.assert_close(out.hidden[0], twice.hidden[0])


def test_a_batch_norm_folded_by_hand(tmp_path: Path) -> None:
    """ε = 1, so that √(var + ε) is 2 and 3: w′ = w g / √, b′ = (0 − mean) g / √ + β."""
    source = Source.open(saved(tmp_path / "m", batch_norm_eps=1.0))
    shape = source.anatomy.site("blocks.0.mlp.up").shape
    norm = "blocks.0.mlp.up.norm"
    weights = {
        "blocks.0.mlp.up.weight": torch.ones(shape),
        f"{norm}.gain": torch.tensor([4.0, 6, 4, 4, 4, 4]),
        f"{norm}.bias": torch.tensor([1.0, 1, 1, 1, 1, 1]),
        f"{norm}.mean": torch.tensor([5.0, 1, 0, 0, 0, 0]),
        f"{norm}.var": torch.tensor([3.0, 8, 3, 3, 3, 3]),
    }
    moves = [Move("fold", "blocks.0.mlp.up.out")]
    folded = apply(moves, source.anatomy, weights)
    assert sorted(folded) == ["blocks.0.mlp.up.bias", "blocks.0.mlp.up.weight"]
    assert folded["blocks.0.mlp.up.weight"][:, 0].tolist() == [2, 2, 2, 2, 2, 2]
    assert folded["blocks.0.mlp.up.bias"].tolist() == [-9, -1, 1, 1, 1, 1]
    after = transform(moves, source.anatomy)
    assert "blocks.0.mlp.up.out" not in after.stream_names
    assert after.norm(norm).slots == {}
    with pytest.raises(MoveError, match=r"needs blocks\.0\.mlp\.up\.weight beside"):
        apply(moves, source.anatomy, {name: w for name, w in weights.items() if not name.endswith("weight")})
    with pytest.raises(MoveError, match="fold it first"):
        apply([Move("permute", "blocks.0.mlp.up.out", torch.arange(6))], source.anatomy, weights)


def test_folded_and_rounded_it_loads_and_tells_what_runs(tmp_path: Path) -> None:
    source = saved(tmp_path / "m")
    receipt = build(parse(recipe("int8")), source, tmp_path / "out")
    assert len(receipt.moves) == 5
    assert max(one.exact for one in receipt.moves) < 1e-13
    found = next(one for one in receipt.sites if one.name == "blocks.0.mlp.up")
    assert found.runs["cpu"] == "simulated (weights are decoded: no kernel convolves codes)"
    loaded = rg.load(tmp_path / "out", dtype=torch.float32)
    assert not any(isinstance(module, BatchNorm) for module in loaded.modules())
    expected = logits(toy())
    assert float((logits(loaded) - expected).abs().max() / expected.abs().max()) < 0.02
    assert not any("norm" in name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path))


def test_gptq_reads_images_and_beats_the_nearest(tmp_path: Path) -> None:
    """On the outputs of the images that it read, over all convolutions."""
    source, data = saved(tmp_path / "m"), images(tmp_path / "x.npz")
    errors = {}
    for rounder in ("nearest", "gptq-ordered"):
        receipt = build(parse(recipe("int3", rounder)), source, tmp_path / rounder, calibration=data)
        errors[rounder] = logits(rg.load(tmp_path / rounder, dtype=torch.float32))
        assert len([one for one in receipt.sites if one.choice]) == 8
    read = (np.load(data)["x"] / 255.0 - 0.5) / 0.5
    x = torch.from_numpy(read).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        whole = toy()(pixel_values=x).logits
        far = {r: float((rg.load(tmp_path / r, dtype=torch.float32)(pixel_values=x).logits - whole).norm())
               for r in errors}  # fmt: skip
    assert far["gptq-ordered"] < 0.8 * far["nearest"]


def test_statistics_taken_anew_are_those_of_the_images(tmp_path: Path) -> None:
    model, x = toy(), pixels(8)
    found = recalibrate(model, [x])
    with torch.no_grad():
        made = model.stem(x)
    torch.testing.assert_close(model.stem_norm.mean, made.mean((0, 2, 3)))
    torch.testing.assert_close(found["stem_norm"][1], made.var((0, 2, 3), correction=0))
    with torch.no_grad():
        now = model(pixel_values=x).logits
        batch = model.train()(pixel_values=x).logits
    torch.testing.assert_close(now, batch)
    with pytest.raises(SettingError, match="there are none"):
        recalibrate(model, [])


def test_norms_divide_by_what_rounded_weights_give(tmp_path: Path) -> None:
    """`statistics: anew`: mean and variance of a convolution's outputs over the images that were read; of 3 bits the
    logits are nearer to the model's for it."""
    source, data, whole = tmp_path / "m", images(tmp_path / "x.npz"), toy()
    read = (np.load(data)["x"] / 255.0 - 0.5) / 0.5
    x = torch.from_numpy(read).permute(0, 3, 1, 2).float()
    recalibrate(whole, [x])
    whole.save_pretrained(source)
    found = {}
    for name, more in (("before", ""), ("anew", "statistics: anew\n")):
        plan = parse(recipe("int3", more=more))
        assert plan == parse(dump(plan))
        receipt = build(plan, source, tmp_path / name, calibration=data if more else None)
        found[name] = rg.load(tmp_path / name, dtype=torch.float32)
        assert (TOLD in receipt.notes) == bool(more)
    model = found["anew"]
    seen = {}
    for number, name in ((0, "conv1"), (2, "conv2")):
        hook = lambda _, args, y, key=(number, name): seen.update({key: y})  # noqa: E731  # a line a layer
        getattr(model.blocks[number], name).register_forward_hook(hook)
    with torch.no_grad():
        logits = whole(pixel_values=x).logits
        far = {name: float((one(pixel_values=x).logits - logits).norm()) for name, one in found.items()}
    for (number, name), y in seen.items():
        norm = getattr(model.blocks[number], name.replace("conv", "bn"))
        torch.testing.assert_close(norm.mean.detach(), y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.var.detach(), y.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.stem_norm.mean, whole.stem_norm.mean)
    assert far["anew"] < 0.8 * far["before"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (FOLD + "statistics: anew\n", "blocks of this regauge_resnet have none"),
        ("inputs: {blocks.*: {grid: int8, grain: token}}\n", "a convolution reads it"),
        ("cache: {'*': {keys: int8/token, values: int8/token}}\n", "keeps"),
    ],
)
def test_what_cannot_be_said_of_convolutions_is_refused(more: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RegaugeError, match=told):
        build(parse(recipe(more=more if FOLD in more else FOLD + more)), saved(tmp_path / "m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_images_and_configs_are_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"reads images \(B, 3, 8, 8\), not \(1, 3, 9, 9\)"):
        toy()(pixel_values=torch.zeros(1, 3, 9, 9))
    for wrong, told in (
        ({"layer_kernels": (3, 3, 2, 3)}, "a kernel of side 2"),
        ({"layer_widths": (5, 5, 11)}, "3 entries for 4 blocks"),
        ({"layer_widths": (5, 3, 11, 11)}, "a shortcut drops none"),
        ({"layer_strides": (1, 1, 3, 1)}, "1 or 2 each"),
        ({"hidden_size": 12}, "hidden_size is 12"),
    ):
        with pytest.raises(ValueError, match=told):
            ResNetConfig(**SIZES | wrong)
    source = saved(tmp_path / "m")
    np.savez(tmp_path / "y.npz", y=np.zeros(3))
    with pytest.raises(TextError, match="holds no images"):
        build(parse(recipe(rounder="gptq")), source, tmp_path / "out", calibration=tmp_path / "y.npz")
    (source / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.2, 0.2]}))
    with pytest.raises(RegaugeError, match="3 numbers are needed"):
        build(parse(recipe(rounder="gptq")), source, tmp_path / "out", calibration=images(tmp_path / "x.npz"))


def test_statistics_count_in_what_a_plan_does() -> None:
    plain, anew = (parse(f"name: a\n{more}rewrites: [fold-norm]\n") for more in ("", "statistics: anew\n"))
    assert digest(plain) != digest(anew)
    assert diff(plain, anew) == ("statistics: as they were → anew",)
    assert combined([plain, anew]).statistics == "anew"
    with pytest.raises(RecipeError, match="statistics are taken anew, or nothing is said of them"):
        parse("name: a\nstatistics: old\nrewrites: [fold-norm]\n")
