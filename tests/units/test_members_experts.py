"""Members whose tokens go to fewer experts: the same numbers inside a family, alone, taken out and in stock code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

import regauge as rg
from regauge.anatomy.sizes import parameter_shapes
from regauge.engine import apply, dry_run
from regauge.engine.extracting import extract
from regauge.engine.subnets import _asked
from regauge.errors import SettingError
from regauge.hosts.transformers.selfdrafts import shared_blocks
from regauge.hosts.transformers.table import anatomy_of
from regauge.plan import parse
from tests import architectures
from tests.families import IDS, given, same
from tests.pico import pico, save

MIXTURES = ("mixtral", "qwen3_moe")
FAMILY = "family: {order: none, experts: [1, 2], depth: [1]}\n"
INT4 = "weights: {blocks.*: {grid: int4, grain: channel, ranger: absmax, scale: f16, rounder: nearest}}\n"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Family and formats → a family of a mixture whose tokens go to three of five experts, made once."""
    known: dict[tuple[str, str], Path] = {}

    def family(name: str, weights: str = "") -> Path:
        if (name, weights) not in known:
            where = tmp_path_factory.mktemp(name)
            source = save(pico(name, num_experts_per_tok=3), where / "model")
            apply(parse(f"name: experts\n{FAMILY}{weights}"), source, where / "out")
            known[name, weights] = where / "out"
        return known[name, weights]

    return family


@pytest.mark.parametrize(("name", "weights"), [("mixtral", ""), ("mixtral", INT4)])
def test_fewer_experts_are_the_same_everywhere(make: Make, name: str, weights: str, tmp_path: Path) -> None:
    out = make(name, weights)
    model = rg.load(out)
    whole = given(model)
    text = "experts=2" if weights or name != "mixtral" else "depth=1,experts=1"
    done = extract(out, text, tmp_path / "alone")
    alone = rg.load(tmp_path / "alone")
    with rg.use(model, text) as active:
        assert str(active) == done.subnet == str(alone.regauge.active)
        found = given(model)
    assert same(found, given(alone))
    assert same(found, given(rg.load(out, subnet=text)))
    assert not same(found, whole)
    if weights:  # by the native step, which is told how many too
        assert model.regauge.member(text).regauge_step.steps == alone.regauge_step.steps == 2
    assert same(given(model), whole)


def test_what_is_taken_out_is_a_stock_checkpoint(make: Make, tmp_path: Path) -> None:
    import transformers

    out = make("mixtral")
    assert not extract(out, "experts=2", tmp_path / "out").unsaid
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts_per_tok"], config["num_local_experts"]) == (2, 5)
    assert "auto_map" not in config
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    with rg.use(model := rg.load(out), "experts=2"):
        assert same(given(stock), given(model))


def test_the_gate_of_a_shared_expert_is_the_same_alone(tmp_path: Path) -> None:
    """Its one row is a product that torch sums as its memory begins: alone it had differed by 2e-6."""
    source = save(architectures.build("qwen3_next"), tmp_path / "model")
    out = tmp_path / "out"
    apply(parse("name: experts\nfamily: {order: none, experts: [1]}\n"), source, out)
    with rg.use(model := rg.load(out), "experts=1"):
        assert same(given(model), given(rg.load(out, subnet="experts=1")))


def test_a_token_goes_to_its_best_experts_by_hand(make: Make) -> None:
    model = rg.load(make("mixtral"))
    path, x_TD = "model.layers.0.mlp", torch.randn(7, 29, generator=torch.Generator().manual_seed(0))
    layer, block = model.regauge.member("experts=1").get_submodule(path), model.get_submodule(path)
    best_T = linear(x_TD, block.gate.weight).argmax(1)
    assert len(best_T.unique()) > 1
    with torch.no_grad():
        y_TD = layer(x_TD[None])[0]
        for x_D, best, y_D in zip(x_TD, best_T, y_TD, strict=True):
            gate, up = linear(x_D, block.experts.gate_up_proj[best]).chunk(2)
            torch.testing.assert_close(y_D, linear(silu(gate) * up, block.experts.down_proj[best]))


def test_requests_name_how_many(make: Make) -> None:
    model = rg.load(make("mixtral", INT4))
    how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    (found,) = model.generate(IDS[:1], subnet="experts=1", **how).logits
    assert not torch.equal(found, model.generate(IDS[:1], **how).logits[0])
    with rg.use(model, "experts=1"):
        assert torch.equal(found, model.generate(IDS[:1], **how).logits[0])


def test_nothing_is_copied(make: Make) -> None:
    model = rg.load(make("mixtral"))
    homes = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    member = model.regauge.member("experts=2")
    assert {tensor.data_ptr() for tensor in (*member.parameters(), *member.buffers())} <= homes
    assert model.config.num_experts_per_tok == model.model.layers[0].mlp.gate.top_k == 3


def test_what_is_not_legal_names_the_nearest(make: Make, tmp_path: Path) -> None:
    out = make("mixtral")
    model = rg.load(out)
    for text, why in (
        ("experts=4", "experts=4, of 1, 2, 3; the nearest that is: full"),
        ("depth=1,experts=9", "the nearest that is: depth=1$"),
        ("experts=1/2", "one number for all blocks"),
    ):
        for ask in (lambda text=text: rg.use(model, text), lambda text=text: extract(out, text, tmp_path / "x")):
            with pytest.raises(SettingError, match=why):
                ask()
    assert model.regauge.settled("experts=3").full
    refused = dry_run(parse("name: a\nfamily: {order: none, experts: [4]}\n"), out.parent / "model").refusals
    assert any("experts 4: a token goes to 3" in why for why in refused)


def test_a_dense_model_says_that_it_has_none(tmp_path: Path) -> None:
    source = save(pico("llama"), tmp_path / "model")
    refused = dry_run(parse("name: a\nfamily: {order: none, experts: [1]}\n"), source).refusals
    assert any("experts: the model has no experts" in why for why in refused)
    apply(parse("name: a\nfamily: {order: none, depth: [1]}\n"), source, tmp_path / "out")
    with pytest.raises(SettingError, match=r"experts=1: the model has no experts .*; the nearest that is: full"):
        rg.use(rg.load(tmp_path / "out"), "experts=1")


def test_a_router_that_takes_no_fewer_is_refused(tmp_path: Path) -> None:
    architectures.build("phimoe").save_pretrained(tmp_path / "model")
    refused = dry_run(parse("name: a\nfamily: {order: none, experts: [1]}\n"), tmp_path / "model").refusals
    assert any("the router of this model takes no fewer" in why for why in refused)


def test_a_draft_shares_the_cache_of_blocks_before_the_first_that_routes_fewer(make: Make) -> None:
    for name, shared in (("mixtral", 1), ("qwen3_moe", 2)):  # the first block of the latter has no experts
        members = rg.load(make(name)).regauge
        assert shared_blocks(members.cut(members.settled("experts=1"))) == shared


def test_biases_of_experts_are_a_stack() -> None:
    model = architectures.build("gpt_oss")
    shapes = {key: tuple(one.shape) for key, one in model.named_parameters()}
    found = parameter_shapes(anatomy_of(model.config, model), shapes)
    assert found == {key: shapes[key] for key in found}
    assert any(key.endswith("experts.down_proj_bias") for key in found)


def test_each_number_is_measured(make: Make) -> None:
    members = rg.load(make("mixtral")).regauge
    asked = [str(one) for one in _asked((), members.family, members.anatomy)]
    assert asked == ["full", "depth=1", "experts=1", "experts=2", "depth=1,experts=1"]


def _names() -> list[Any]:
    known = architectures.listed()
    mixtures = [name for name, row in known.items() if "experts" in str(row.get("config")) and name != "phimoe"]
    return [*mixtures, "gemma4_text"]


@pytest.mark.slow
@pytest.mark.parametrize("name", _names())
def test_every_family_with_experts(name: str, tmp_path: Path) -> None:
    """Modules that were told are those that stock code builds of the smaller number."""
    other: dict[str, Any] = {"llama4_text": {"num_experts_per_tok": 2}}.get(name, {})
    if name == "gemma4_text":
        other = {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 28}
    model = architectures.build(name, other=other)
    model.save_pretrained(tmp_path / "model")
    apply(parse("name: a\nfamily: {order: none, experts: [1]}\n"), tmp_path / "model", tmp_path / "out")
    family, told = rg.load(tmp_path / "out"), architectures.inputs(model)
    extract(tmp_path / "out", "experts=1", tmp_path / "alone")
    stock = type(model).from_pretrained(tmp_path / "alone")
    with torch.no_grad(), rg.use(family, "experts=1"):
        found = family(**told).logits
    assert torch.equal(found, rg.load(tmp_path / "alone")(**told).logits)
    with torch.no_grad():
        torch.testing.assert_close(stock(**told).logits, found, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(family(**told).logits, found, rtol=1e-4, atol=1e-4)
    member = family.regauge.member("experts=1")
    for path, module in stock.named_modules():
        own = vars(member.get_submodule(path))
        for key, value in vars(module).items():
            if type(value) is int and type(own.get(key)) is int:
                assert own[key] == value, f"{path}.{key}"
