"""A dense model divided into experts behind a fixed router: what all of them are, what is trained, how many run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

import regauge as rg
from regauge.artifact.files import read
from regauge.elastic.subnet import Subnet
from regauge.engine.extracting import extract
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_cost import planned
from regauge.engine.training_recipe import Asked
from regauge.errors import RecipeError
from regauge.hosts import host_of
from regauge.learn.samplers import Growing
from regauge.learn.space import WHOLE, Choice, Space, Turn
from regauge.learn.training import Training
from regauge.plan import Plan, parse
from tests.pico import SMALL, pico, save
from tests.words import save_tokenizer, text

TEXT = [text(2000, seed) for seed in range(3)]
FEW = Asked(Amounts(tokens=1024, length=32))
IDS = torch.arange(3, 30)[None]


def plan(more: str = "experts: 4", family: str = "experts: [2, 3]") -> Plan:
    return parse(
        f"name: f\nfamily: {{{family}}}\ntrain: {{sampler: growing, batch: 128, rate: 0.01, steps: 5, {more}}}\n"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save(pico("llama", **SMALL), tmp_path_factory.mktemp("dividing") / "model"))


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("divided") / "out"
    train(plan(), model, made, TEXT, FEW)
    return made


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_all_experts_are_the_dense_layer(name: str, tmp_path: Path) -> None:
    source = host_of(tmp_path).open(save(pico(name, **SMALL), tmp_path / "model"))
    (tmp_path / "made").mkdir()
    made = host_of(tmp_path).divided(source, 4, tmp_path / "made", seed=3)
    assert made.anatomy.plumbing.routed == 4
    assert host_of(tmp_path).divided(source, 4).shapes.keys() == made.shapes.keys()
    dense, mixture = rg.load(tmp_path / "model"), rg.load(tmp_path / "made")
    with torch.no_grad():
        torch.testing.assert_close(mixture(IDS).logits, dense(IDS).logits, rtol=0, atol=0.02)
        gate = mixture.model.layers[0].mlp.gate
        gate.weight.zero_()
        mixture.model.layers[1].mlp.gate.weight.zero_()
        torch.testing.assert_close(mixture(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_k_of_n_are_the_layer_of_their_neurons_scaled_up_by_hand(out: Path) -> None:
    family = rg.load(out, dtype=torch.float32)
    x_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    layer = family.regauge.member("experts=2").model.layers[0].mlp
    score_TN = linear(x_TD, layer.gate.weight)
    assert len(score_TN.topk(2, 1).indices.unique()) > 2  # it depends on the token
    assert score_TN.abs().max() < 0.01  # and the weights hardly do
    with torch.no_grad():
        for x_D, y_D, chosen in zip(x_TD, layer(x_TD[None])[0], score_TN.topk(2, 1).indices, strict=True):
            wanted = torch.zeros(32)
            for expert, share in zip(chosen, linear(x_D, layer.gate.weight)[chosen].softmax(0), strict=True):
                gate, up = linear(x_D, layer.experts.gate_up_proj[expert]).chunk(2)
                wanted += share * linear(silu(gate) * up, layer.experts.down_proj[expert])
            torch.testing.assert_close(y_D, wanted, rtol=1e-4, atol=1e-4)


def test_the_router_stays_and_k_grows(model: Path, out: Path) -> None:
    stored = {key: one for path in out.glob("*.safetensors") for key, one in read(path).items()}
    trained = host_of(out).trainee(out, held=Training(experts=4).held)
    assert not any("mlp.gate." in key for key in trained.parameters)
    assert any("mlp.gate." in key for key in host_of(out).trainee(out).parameters)
    host = host_of(model)
    source, first = host.open(model), out.parent / "first"
    first.mkdir()
    made = host.divided(source, 4, first)
    before = {name: made.read([name])[name] for name in ("blocks.0.moe.router.weight", "blocks.0.moe.1.up.weight")}
    after = host.open(out).read(before)
    assert torch.equal(before["blocks.0.moe.router.weight"], after["blocks.0.moe.router.weight"])
    assert not torch.equal(before["blocks.0.moe.1.up.weight"], after["blocks.0.moe.1.up.weight"])
    assert stored
    space = Space({"experts": (WHOLE, *(Choice(k, k / 4) for k in (3, 2)))}, 2)
    drawn = [Growing()(space, Turn(step, 8))[0].subnet for step in range(8)]
    assert drawn == [Subnet(experts=2)] * 3 + [Subnet(experts=3)] * 3 + [Subnet()] * 2


def test_what_is_written_is_told_and_stock_code_reads_any_k(model: Path, out: Path, tmp_path: Path) -> None:
    import transformers

    receipt = train(plan(), model, tmp_path / "again", TEXT, FEW)
    assert receipt.source == str(model)
    assert "divided into 4 experts each, behind a fixed router" in receipt.notes[0]
    assert receipt.trained is not None
    assert all(one.after < one.before for one in receipt.trained.members.values())
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert not extract(out, "experts=2", tmp_path / "two").unsaid
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two", experts_implementation="eager")
    family = rg.load(out)
    with rg.use(family, "experts=2"), torch.no_grad():
        assert torch.equal(stock(IDS).logits, family(IDS).logits)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (plan("experts: 5"), "layers of 48 neurons do not fall into 5 equal experts"),
        (plan(family="depth: [1]"), "say family: {experts"),
        (plan("experts: 4, gates: 0.5", family="experts: [2], ffn: [0.5]"), "neither rank nor gates"),
    ],
)
def test_what_is_not_divided(model: Path, tmp_path: Path, recipe: Plan, why: str) -> None:
    for ask in (lambda: train(recipe, model, tmp_path / "out", TEXT, FEW), lambda: planned(recipe, model, TEXT, FEW)):
        with pytest.raises(RecipeError, match=why):
            ask()
    assert planned(plan(), model, TEXT, FEW).choices == "experts (3)"


@pytest.mark.parametrize(
    ("name", "sizes", "why"),
    [
        ("gpt2", {}, "not of the dense families"),
        ("llama-bias", {}, "has a bias"),
        ("mixtral", {}, "a mixtral is not of the dense families"),
    ],
)
def test_models_that_are_not_divided(name: str, sizes: dict[str, Any], why: str, tmp_path: Path) -> None:
    host = host_of(tmp_path)
    assert why in host.undivided(host.open(save(pico(name, **sizes), tmp_path / "model")), 2)


def test_a_layer_is_divided_into_two_or_more() -> None:
    for count in (1, -2, 257):
        with pytest.raises(ValueError, match="2 to 256 experts"):
            Training(experts=count)
    with pytest.raises(ValueError, match="router is one of fixed, trained"):
        Training(experts=2, router="random")
