"""What a transform and a static step are for, on a whole model whose inner activations have outlier channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import regauge as rg
from regauge.engine import apply
from regauge.plan import dump, load, parse
from tests import tiny
from tests.artifacts import outputs
from tests.pico import pico

READ = {"tokens": 512, "length": 32}
IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"), 6000)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico llama, three of whose neurons fire thirty times as high as the others."""
    path = tmp_path_factory.mktemp("outliers")
    model = pico("llama", vocab_size=tiny.VOCABULARY, intermediate_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[[3, 20, 51]] *= 30
    tiny.tokenizer().save_pretrained(path)
    model.save_pretrained(path)
    return path


def error(recipe: object, model: Path, text: Path, out: Path) -> float:
    apply(recipe, model, out, calibration=text, **READ)  # type: ignore[arg-type]  # a name or a plan
    whole, found = outputs(rg.load(model), IDS), outputs(rg.load(out, activations="float32"), IDS)
    return float((found - whole).norm() / whole.norm())


def test_a_hadamard_before_down_is_worth_it_at_four_bits(outliers: Path, text: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("identity", "hadamard"):
        plan = parse(
            "name: four\nweights: {blocks.*.mlp.down: {grid: int8, grain: channel}}\n"
            f"inputs: {{blocks.*.mlp.hidden: {{transform: {name}, grid: int4, grain: token}}}}\n"
        )
        found[name] = error(plan, outliers, text, tmp_path / name)
    assert found["hadamard"] < 0.8 * found["identity"]


def test_what_down_reads_is_what_two_more_bits_are_for(outliers: Path, text: Path, tmp_path: Path) -> None:
    """FlexQ against itself with 6 bits everywhere: what it spends above them goes where neurons fire high."""
    mixed = load("flexq-w6a6")
    assert [rule.select for rule in mixed.of("inputs")] == ["blocks.*", "blocks.*.mlp.hidden"]
    even = replace(mixed, places={**mixed.places, "inputs": mixed.of("inputs")[:1]})
    other = parse(dump(mixed).replace("blocks.*.mlp.hidden", "blocks.*.mlp.in"))
    found = [error(plan, outliers, text, tmp_path / str(at)) for at, plan in enumerate((mixed, even, other))]
    assert found[0] < 0.8 * found[1]
    assert found[0] < 0.8 * found[2]


def test_the_preset_keeps_what_its_hadamard_saves(outliers: Path, text: Path, tmp_path: Path) -> None:
    """The preset with the grid of one activation made coarse, with its transform and without."""
    plan = load("quarot-w4a8")
    hidden = next(rule for rule in plan.of("inputs") if rule.select == "blocks.*.mlp.hidden")
    assert hidden.point is not None
    assert hidden.point.name("transform") == "hadamard"
    receipt = apply("quarot-w4a8", outliers, tmp_path / "out", calibration=text, **READ)
    read = {tap.name: tap.reading["transform"] for tap in receipt.taps}
    assert read["blocks.0.mlp.hidden"] == "hadamard"
    assert read["blocks.0.mlp.in"] == "identity"
    assert {s for move in receipt.moves if move.rewrite == "hadamard on inputs" for s in move.streams} == {
        "blocks.0.mlp.hidden",
        "blocks.1.mlp.hidden",
    }


def test_a_static_step_is_calibrated_and_the_same_for_every_token(outliers: Path, text: Path, tmp_path: Path) -> None:
    dynamic = error("smoothquant", outliers, text, tmp_path / "dynamic")
    static = error("smoothquant-static", outliers, text, tmp_path / "static")
    assert dynamic < static < 20 * dynamic  # a step that is not calibrated, or not stored, is off by far more
    assert static < 0.3
