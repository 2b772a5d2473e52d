"""Taps with a transform or a static step, end to end: applied, written, loaded, multiplied, and taken by the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import regauge as rg
from regauge.engine import apply
from regauge.errors import ArtifactError, RecipeError, RefusedError
from regauge.kernels.cpu.library import available
from regauge.plan import Plan, parse
from regauge.runtime.matrices.modules import PackedLinear, PackedMatrix
from regauge.text.calibration import draw
from regauge.text.corpora import corpus
from tests import tiny
from tests.artifacts import outputs
from tests.pico import pico, save

READ = {"tokens": 512, "length": 32}
IDS = torch.arange(3, 30)[None]
W8 = "{grid: int8, grain: channel, ranger: absmax, scale: f32, rounder: nearest}"
HADAMARD = "{transform: hadamard, grid: int8, grain: token}"
STATIC = "{grid: int8, grain: tensor, ranger: static}"
DIAGONAL = "{transform: diagonal, grid: int8, grain: token}"
BOTH = "{transform: hadamard, grid: int8-asym, grain: tensor, ranger: static}"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"), 6000)


@pytest.fixture(scope="module", params=[37, 48], ids=["prime", "constructed"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(pico("llama", vocab_size=258, intermediate_size=request.param), tmp_path_factory.mktemp("model") / "m")
    tiny.tokenizer().save_pretrained(path)
    return path


def recipe(reading: str, tap: str = "blocks.*.mlp.hidden", weights: str = W8) -> Plan:
    return parse(f'name: taps\nweights: {{"blocks.*": {weights}}}\ninputs: {{"{tap}": {reading}}}\n')


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def by_hand(path: Path) -> Any:
    """The source's own modules with the weights that the artifact's codes stand for, each input read as it says."""
    packed = rg.load(path, activations="float32")
    for module in [m for m in packed.modules() if isinstance(m, PackedLinear)]:
        (part,) = module.parts
        assert isinstance(part, PackedMatrix)
        w_OI, reading = part.rows(0, part.shape[0]), part.reading

        def forward(x: torch.Tensor, w_OI: torch.Tensor = w_OI, reading: Any = reading) -> torch.Tensor:
            return torch.nn.functional.linear(x if reading is None else reading.simulate(x), w_OI)

        module.forward = forward
    return packed


@pytest.mark.parametrize("reading", [HADAMARD, STATIC, DIAGONAL, BOTH], ids=["hadamard", "static", "diagonal", "both"])
def test_a_tap_is_read_as_its_recipe_says(reading: str, model: Path, text: Path, tmp_path: Path) -> None:
    receipt = apply(recipe(reading), model, tmp_path / "out", calibration=text, **READ)
    loaded = rg.load(tmp_path / "out", activations="float32")
    whole = outputs(rg.load(model), IDS)
    found = outputs(loaded, IDS)
    assert apart(found, whole) < 0.03  # 8 bits: a transform that is not undone in the weights gives 1
    assert apart(found, outputs(by_hand(tmp_path / "out"), IDS)) < 1e-3
    moves = [move for move in receipt.moves if move.rewrite.endswith("on inputs")]
    if "transform" in reading:
        assert [move.streams for move in moves] == [("blocks.0.mlp.hidden",), ("blocks.1.mlp.hidden",)]
        assert max(move.exact for move in moves) < 1e-10
    else:
        assert moves == []


@pytest.mark.skipif(not available(), reason="the C++ kernels were not built here")
@pytest.mark.parametrize("reading", [HADAMARD, STATIC, DIAGONAL, BOTH], ids=["hadamard", "static", "diagonal", "both"])
def test_the_step_takes_them(reading: str, model: Path, text: Path, tmp_path: Path) -> None:
    apply(recipe(reading), model, tmp_path / "out", calibration=text, **READ)
    loaded = rg.load(tmp_path / "out", activations="float32")
    with torch.no_grad():
        past = loaded(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        before = loaded.regauge_step.steps
        ours = loaded(input_ids=IDS[:, -1:], past_key_values=past).logits[:, -1]
    assert loaded.regauge_step.steps == before + 1
    # A value on a tie takes one code here and its neighbour there.
    assert apart(ours, outputs(by_hand(tmp_path / "out"), IDS)[:, -1]) < 5e-3


def test_what_is_kept_lies_under_the_tap(model: Path, text: Path, tmp_path: Path) -> None:
    apply(recipe(BOTH), model, tmp_path / "out", calibration=text, **READ)
    tensors: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(path)
    kept = {key: tuple(t.shape) for key, t in tensors.items() if key.startswith("blocks.0.mlp.hidden.")}
    wanted = {"blocks.0.mlp.hidden.scale": (1, 1), "blocks.0.mlp.hidden.zero": (1, 1)}
    prime = pico_width(model) == 37
    assert kept == wanted | ({"blocks.0.mlp.hidden.factor": (37, 37)} if prime else {})


def test_a_static_step_is_that_of_what_is_read_after_the_transform(model: Path, text: Path, tmp_path: Path) -> None:
    """By hand: the inner activation of the source's first block on the calibration text, turned, least to greatest."""
    apply(recipe(BOTH), model, tmp_path / "out", calibration=text, **READ)
    packed, source = rg.load(tmp_path / "out"), rg.load(model)
    reading = packed.model.layers[0].mlp.down_proj.parts[0].reading
    seen: list[torch.Tensor] = []
    source.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        source(draw(corpus(text), tiny.tokenizer(), 512, 32, 0, True).inputs)
    turned = reading.transform.forward(seen[0].double())
    assert (turned - seen[0]).abs().max() > 0.1 * seen[0].abs().max()
    step = float(turned.max().clamp(min=0) - turned.min().clamp(max=0)) / 255
    assert float(reading.step.scale_G1) == pytest.approx(step, rel=1e-4)


def pico_width(model: Path) -> int:
    import json

    return int(json.loads((model / "config.json").read_text())["intermediate_size"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.mlp.hidden.scale"), r"blocks.0.mlp.hidden do not fit .* the scale .* nothing"),
        (
            lambda t: t.update({"blocks.0.mlp.hidden.scale": torch.ones(2, 1)}),
            r"the scale of a static step is \[1, 1\]",
        ),
        (lambda t: t.update({"blocks.0.mlp.hidden.scale": -torch.ones(1, 1)}), "positive and finite"),
        (lambda t: t.update({"blocks.0.mlp.hidden.bend": torch.ones(1)}), "'bend' belongs to nothing"),
        (
            lambda t: t.update({"blocks.0.mlp.down.made-up.left": torch.ones(1)}),
            "blocks.0.mlp.down has a term of kind 'made-up', which this regauge cannot apply.*upgrade",
        ),
    ],
)
def test_a_tampered_artifact_is_refused(change: Any, message: str, model: Path, text: Path, tmp_path: Path) -> None:
    apply(recipe(STATIC), model, tmp_path / "out", calibration=text, **READ)
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        if "blocks.0.mlp.hidden.scale" in tensors:
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=message):
        rg.load(tmp_path / "out")


def test_what_cannot_be_is_refused_before_any_work(model: Path, text: Path, tmp_path: Path) -> None:
    token = recipe("{grid: int8, grain: token, ranger: static}")
    with pytest.raises(RecipeError, match="ranger 'static' of inputs works through grain tensor or group, and 'token'"):
        apply(token, model, tmp_path / "out", calibration=text, **READ)
    for reading, why in ((STATIC, "were not tried"), (HADAMARD, "no transform_config: it would leave hadamard out")):
        with pytest.raises(RefusedError, match=why):
            apply(recipe(reading), model, tmp_path / "out", calibration=text, wire="compressed-tensors", **READ)
    outside = parse(f'name: x\nweights: {{"blocks.*": {W8}, head: {W8}}}\ninputs: {{head.in: {HADAMARD}}}\n')
    with pytest.raises(RecipeError, match=r"head\.in is read outside the blocks, where activations have no transform"):
        apply(outside, model, tmp_path / "out", calibration=text, **READ)
    assert not (tmp_path / "out").exists()
