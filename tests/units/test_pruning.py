"""Pruning end to end: `apply` with a shape, what it writes, what it measures, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regauge as rg
from regauge import artifact
from regauge.artifact.folder import read_receipt
from regauge.cli import main
from regauge.engine import apply, dry_run
from regauge.errors import RecipeError, RefusedError, RegaugeError, TextError
from regauge.plan import Plan, load, parse
from regauge.text.calibration import draw
from regauge.text.corpora import corpus
from tests import tiny
from tests.artifacts import outputs
from tests.pico import batches, pico, save

READ = {"tokens": 512, "length": 32}
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text(tmp_path_factory.mktemp("text"), 6000)


def recipe(rest: str = "", weights: str = "", **shape: str) -> Plan:
    """A recipe that prunes neurons, with other parts on some axes."""
    point = {"unit": "neuron", "allocation": "uniform:0.75"} | shape
    row = ", ".join(f"{axis}: {part}" for axis, part in point.items())
    return parse(f"name: cut\nshape:\n  blocks.*.ffn: {{{row}}}\n{weights}{rest}")


def test_an_even_cut_is_a_plain_checkpoint_that_stock_code_loads(model: Path, text: Path, tmp_path: Path) -> None:
    import transformers

    receipt = apply(recipe(repair="least-squares"), model, tmp_path / "out", calibration=text, **READ)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 28  # three quarters of 37, to the nearest 4
    assert "quantization_config" not in config
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.model.layers[1].mlp.down_proj.in_features == 28
    assert torch.equal(outputs(stock, IDS), outputs(rg.load(tmp_path / "out"), IDS))
    before, after = pico("llama", vocab_size=258).num_parameters(), stock.num_parameters()
    assert before - after == 2 * 3 * 9 * 42
    assert receipt.bytes_after == 4 * after
    sizes = {site.name: site.shape for site in receipt.sites}
    assert sizes["blocks.0.mlp.gate"] == (28, 42)
    assert sizes["blocks.1.mlp.down"] == (42, 28)
    assert receipt == read_receipt(tmp_path / "out")


def test_a_select_is_measured_and_an_exact_move_certified(model: Path, text: Path, tmp_path: Path) -> None:
    receipt = apply(recipe("rewrites: [fold-norm, rotate]\n"), model, tmp_path / "out", calibration=text, **READ)
    assert {move.proof for move in receipt.moves} == {"certified"}
    assert max(move.exact for move in receipt.moves) < 1e-10
    assert [(select.block, select.before, select.after, select.proof) for select in receipt.selects] == [
        (0, 37, 28, "measured"),
        (1, 37, 28, "measured"),
    ]
    first = receipt.selects[0]
    assert first.how == {
        "unit": "neuron",
        "score": "activation",
        "allocation": "uniform:0.75",
        "schedule": "once",
        "repair": "none",
    }
    assert first.streams == ("blocks.0.ffn",)
    assert first.tokens == 512
    assert 0 < first.error < first.added < 1


def test_the_measured_error_is_that_of_the_blocks_themselves(model: Path, text: Path, tmp_path: Path) -> None:
    """By hand: the first block of the cut model beside that of the source, on the calibration text."""
    receipt = apply(recipe(score="magnitude"), model, tmp_path / "out", calibration=text, **READ)
    source, cut = rg.load(model), rg.load(tmp_path / "out")
    ids = draw(corpus(text), tiny.tokenizer(), 512, 32, 0, True).inputs
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True).hidden_states for m in (source, cut)]
    x, whole, after = states[0][0], states[0][1], states[1][1]
    assert receipt.selects[0].error == pytest.approx(float((after - whole).norm() / whole.norm()), rel=1e-3)
    assert receipt.selects[0].added == pytest.approx(float((after - whole).norm() / (whole - x).norm()), rel=1e-3)


def test_repair_and_score_lower_what_is_measured(model: Path, text: Path, tmp_path: Path) -> None:
    def error(**shape: str) -> float:
        out = tmp_path / "-".join(shape.values()).replace(":", "")
        return apply(recipe(**shape), model, out, calibration=text, **READ).selects[0].error

    lot, scored = error(score="random"), error(score="activation")
    mended = error(score="activation", repair="least-squares")
    assert mended < 0.9 * scored
    assert scored < 0.9 * lot


def test_keeping_everything_changes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    plan = recipe(allocation="uniform:1", repair="least-squares")
    receipt = apply(plan, model, tmp_path / "out", calibration=text, **READ)
    assert [select.error for select in receipt.selects] == [0, 0]
    assert torch.equal(outputs(rg.load(tmp_path / "out"), IDS), outputs(rg.load(model), IDS))


@pytest.mark.parametrize("wire", [None, "regauge"])
def test_it_composes_with_quantised_weights(wire: str | None, model: Path, text: Path, tmp_path: Path) -> None:
    weights = "weights:\n  blocks.*: {grid: int8, grain: group:14 else channel, rounder: gptq}\n"
    plan = recipe(weights=weights, repair="least-squares")
    receipt = apply(plan, model, tmp_path / "out", calibration=text, wire=wire, **READ)
    assert receipt.wire == (wire or "compressed-tensors")
    down = next(site for site in receipt.sites if site.name == "blocks.0.mlp.down")
    assert down.choice is not None
    assert down.choice["grain"] == "group:14"  # divides the 28 that stay and not the 37 that were
    assert (down.error or 1) < 0.02
    plain = apply(recipe(repair="least-squares"), model, tmp_path / "plain", calibration=text, **READ)
    assert receipt.bytes_after < 0.7 * plain.bytes_after
    loaded = rg.load(tmp_path / "out", activations="float32")
    ours, theirs = outputs(loaded, IDS), outputs(rg.load(tmp_path / "plain"), IDS)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03
    assert plain.selects[0].error == receipt.selects[0].error  # measured before rounding
    codes = {name: found for block in artifact.open(tmp_path / "out").blocks() for name, found in block.codes.items()}
    assert tuple(codes["blocks.1.mlp.down"].codes_OI.shape) == (42, 28)


def test_uneven_sizes_take_our_own_format(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    plan = recipe(allocation="{part: global, keep: 0.6, multiple: 1}")
    receipt = apply(plan, model, tmp_path / "out", calibration=text, **READ)
    assert receipt.wire == "regauge"
    assert any("one number for all blocks" in reason for reason in receipt.refusals)
    kept = [select.after for select in receipt.selects]
    assert sum(kept) == round(0.6 * 2 * 37)
    assert kept[0] != kept[1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 37
    assert config["quantization_config"]["sizes"]["blocks.1.mlp.up"] == [kept[1], 42]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    for block, width in enumerate(kept):
        assert re.search(rf"blocks\.\*\.mlp\.down in block {block} +42 × {width} ", told)
    loaded = rg.load(tmp_path / "out")
    assert [layer.mlp.up_proj.out_features for layer in loaded.model.layers] == kept
    stored = sum(t.numel() for path in (tmp_path / "out").glob("*.safetensors") for t in load_file(path).values())
    assert sum(p.numel() for p in loaded.parameters()) == stored
    with pytest.raises(RefusedError, match="one number for all blocks"):
        apply(plan, model, tmp_path / "stock", calibration=text, wire="compressed-tensors", **READ)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "opt", "gemma2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("allocation", ["uniform:0.75", "{part: global, keep: 0.6, multiple: 1}"])
def test_every_way_of_storing(name: str, allocation: str, text: Path, tmp_path: Path) -> None:
    """Whatever the storage, the artifact loads in its sizes and computes nearly what the source does."""
    source = tiny.folder(tmp_path / "model", name)
    select = "kind:ffn"
    plan = parse(f"shape:\n  {select}: {{unit: neuron, allocation: {allocation}, repair: least-squares}}\n")
    receipt = apply(plan, source, tmp_path / "out", calibration=text, **READ)
    assert len(receipt.selects) == 2
    loaded, whole = rg.load(tmp_path / "out"), rg.load(source)
    loaded.config._experts_implementation = whole.config._experts_implementation = "eager"
    shares = [select.after / select.before for select in receipt.selects]
    assert all(0.3 < share < 0.9 for share in shares)
    far = float((outputs(loaded, IDS) - outputs(whole, IDS)).norm() / outputs(whole, IDS).norm())
    assert 1e-5 < far < 1


def test_an_encoder_is_pruned_too(text: Path, tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "model", "bert-mlm")
    receipt = apply(recipe(repair="least-squares"), source, tmp_path / "out", calibration=text, **READ)
    assert receipt.wire == "compressed-tensors"
    found = outputs(rg.load(tmp_path / "out"), IDS)
    assert found.shape == outputs(rg.load(source), IDS).shape


def test_a_dry_run_counts_the_bytes_that_stay(model: Path, text: Path, tmp_path: Path) -> None:
    for number, allocation in enumerate(("uniform:0.75", "global:0.75")):
        plan = recipe(allocation=allocation, repair="least-squares")
        told = dry_run(plan, model, calibration=text, **READ)
        done = apply(plan, model, tmp_path / str(number), calibration=text, **READ)
        assert told.bytes_bf16 == done.bytes_bf16
        assert abs(told.bytes_after - done.bytes_after) <= (0 if number == 0 else 0.05 * done.bytes_after)
        down = next(site for site in told.sites if site.name == "blocks.0.mlp.down")
        assert (down.shape, down.bytes_before) == ((42, 28), 2 * 42 * 37)
        assert any("takes units out" in line for line in told.passes)
        assert any("decided after" in note for note in told.notes) == (number == 1)


def test_a_killed_run_goes_on_with_the_sizes_it_had_chosen(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regauge.engine import driver

    plan = recipe(allocation="{part: global, keep: 0.6, multiple: 1}", repair="least-squares")
    apply(plan, model, tmp_path / "whole", calibration=text, **READ)

    class Killed(Exception):
        """Stands for a kill."""

    def die(self: Any, block: int) -> None:
        if block == 1:
            raise Killed
        return block_(self, block)

    block_ = driver.Drive._block
    with monkeypatch.context() as patch:
        patch.setattr(driver.Drive, "_block", die)
        with pytest.raises(Killed):
            apply(plan, model, tmp_path / "out", calibration=text, **READ)
    apply(plan, model, tmp_path / "out", calibration=text, **READ)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (
            "blocks.*.ffn: {unit: neuron, allocation: 'uniform:0'}",
            "keep is the share that stays, above 0 and at most 1",
        ),
        ("blocks.*.ffn: {unit: neuron, allocation: 'uniform:1.2'}", r"at most 1; you wrote 1\.2"),
        ("blocks.*.ffm: {unit: neuron}", r"selector 'blocks\.\*\.ffm' matches nothing"),
        ("blocks.*.heads: {unit: neuron}", r"cannot be taken out of blocks\.0\.heads: a group of heads is no neuron"),
        ("blocks.1: {unit: neuron}", r"cannot be taken out of blocks\.1, a whole block; write blocks\.\*\.ffn"),
        ("residual: {unit: neuron}", "the residual is shared by all blocks"),
        ("blocks.*.ffn: {unit: neurone}", "there is no unit 'neurone' .did you mean 'neuron'"),
        ("blocks.*.ffn: {unit: neuron, score: hessian}", "there is no score 'hessian'"),
        ("blocks.*.ffn: {score: magnitude}", "lacks 'unit'"),
        ("blocks.*.ffn: {unit: neuron, allocation: {part: uniform, multiple: 64}}", "multiple is 64, and blocks.0.ffn"),
        ("blocks.*.ffn: {unit: neuron, repair: 'least-squares:0'}", "damp is above 0"),
    ],
)
def test_what_cannot_be_pruned_is_told_in_a_sentence(
    shape: str, why: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=why):
        apply(parse(f"shape:\n  {shape}\n"), model, tmp_path / "out", calibration=text, **READ)
    assert not list(tmp_path.iterdir())


def test_without_text_a_cut_is_refused_where_the_model_cannot_write_its_own(tmp_path: Path) -> None:
    source = tiny.folder(tmp_path / "model", "bert-mlm")
    with pytest.raises(TextError, match="reads calibration text, and bert does not generate text"):
        apply(recipe(), source, tmp_path / "out")


def test_formats_are_checked_against_what_stays(model: Path, text: Path, tmp_path: Path) -> None:
    """Groups that divided the source's width and do not divide the pruned one are refused before any work."""
    source = save(pico("llama", intermediate_size=40), tmp_path / "model")
    tiny.tokenizer().save_pretrained(source)
    plan = recipe(weights="weights:\n  '*.down': {grid: int8, grain: group:20}\n", allocation="uniform:0.7")
    with pytest.raises(RegaugeError, match="groups of 20 do not divide a width of 28"):
        apply(plan, source, tmp_path / "out", calibration=text, **READ)


def test_the_preset_from_the_command_line(model: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    command = ["apply", "neurons-75", str(model), "-o", str(out), "--calibration", str(text), "--tokens", "512"]
    assert main([*command, "--dry-run"]) == 0
    assert "28 × 42" in capsys.readouterr().out
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "56 of 74 units stay in 2 blocks" in told
    assert "measured" in told
    assert load(out) == load("neurons-75")
    assert main(["inspect", str(out)]) == 0
    assert "28 × 42" in capsys.readouterr().out


def test_a_batch_of_pixels_is_pruned_by(tmp_path: Path) -> None:
    import numpy as np

    whole = pico("vit", num_channels=3)
    source = save(whole, tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 255, (64, 15, 15, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=images)
    receipt = apply(
        recipe(repair="least-squares"), source, tmp_path / "out", calibration=tmp_path / "x.npz", tokens=576
    )
    assert [select.after for select in receipt.selects] == [28, 28]
    assert outputs(rg.load(tmp_path / "out"), batches(whole)[0].float()).shape[-1] == 7
