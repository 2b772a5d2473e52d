"""Families with a router: what it writes, who answers a request, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regauge as rg
from regauge.artifact.router import FILE, Router, router_bytes, told_by
from regauge.elastic.subnet import Subnet
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_cost import planned
from regauge.engine.training_recipe import Asked
from regauge.errors import ArtifactError, RecipeError, SettingError
from regauge.plan import Plan, parse
from tests.pico import pico, save
from tests.words import save_tokenizer, text

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_attention_heads": 4}
TEXT = [text(2000, seed) for seed in range(3)]
MEMBERS = "members: {small: 'depth=1', middle: 'depth=2'}"
FEW = Asked(Amounts(tokens=512, length=32))
IDS = torch.arange(3, 19)[None]
HOW: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def plan(route: str = "0.6", members: str = MEMBERS) -> Plan:
    family = f"family: {{order: none, depth: [2, 1], {members}}}\n"
    return parse(f"name: r\n{family}train: {{sampler: named, steps: 2, batch: 128, route: {route}}}\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = SIZES | {"num_key_value_heads": 2, "num_hidden_layers": 3}
    return save_tokenizer(save(pico("llama", **sizes), tmp_path_factory.mktemp("routing") / "model"))


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    trained = train(plan(), model, model.parent / "out", TEXT, FEW).trained
    assert trained is not None
    way = trained.routed
    assert way is not None
    assert set(way.shares) == {"full", "depth=2", "depth=1"}
    assert sum(way.shares.values()) == pytest.approx(1)
    assert way.compute == pytest.approx(
        sum(way.shares[name] * cost for name, cost in zip(way.shares, (1, 2 / 3, 1 / 3), strict=True))
    )
    assert way.by_lot == pytest.approx(sum(way.shares[name] * way.alone[name] for name in way.shares))
    return model.parent / "out"


def test_a_request_is_answered_by_the_member_of_its_prompt(out: Path) -> None:
    model = rg.load(out, dtype="float32")
    seen = model.get_input_embeddings()(IDS).float().mean(1)
    rows = {"depth=1": torch.cat([seen[0], torch.zeros(1)]), "depth=2": torch.cat([-seen[0], torch.zeros(1)])}
    kept = (out / FILE).read_bytes()
    try:
        (out / FILE).write_bytes(router_bytes(rows))
        model = rg.load(out, dtype="float32")
        assert torch.equal(model.generate(IDS, subnet="route", **HOW), model.generate(IDS, subnet="small", **HOW))
        (out / FILE).write_bytes(router_bytes({"depth=1": rows["depth=2"], "depth=2": rows["depth=1"]}))
        model = rg.load(out, dtype="float32")
        model.generation_config.subnet = "route"
        assert torch.equal(model.generate(IDS, **HOW), model.generate(IDS, subnet="middle", **HOW))
        assert model.regauge.active.full
        assert Subnet(depth=1) not in model.regauge.members()
        with pytest.raises(SettingError, match="this call has none"):
            model.generate(**HOW)
    finally:
        (out / FILE).write_bytes(kept)


def test_padding_tells_a_router_nothing() -> None:
    embedded = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(told_by(embedded, mask), embedded[:, 2:].mean(1))
    router = Router((Subnet(), Subnet(depth=1)), torch.randn(2, 4), torch.zeros(2))
    torch.testing.assert_close(router(embedded, mask), router(embedded[:, 2:]))


def test_a_family_without_a_router_says_how_to_have_one(out: Path, tmp_path: Path) -> None:
    rg.apply(parse("name: f\nfamily: {order: none, depth: [1]}\n"), out.parent / "model", tmp_path / "f", quiet=True)
    model = rg.load(tmp_path / "f")
    with pytest.raises(SettingError, match="regauge learn aptp"):
        model.generate(IDS, subnet="route", **HOW)
    with pytest.raises(SettingError, match="no member called 'route'"), rg.use(model, "route"):
        pass


def test_the_router_of_another_family_is_refused(out: Path) -> None:
    good = {key: one.clone() for key, one in load_file(out / FILE).items()}
    kept = (out / FILE).read_bytes()
    short = {key: one[:5] for key, one in good.items()}
    torn = good | {"full": torch.full_like(good["full"], float("nan"))}
    try:
        for rows, why in (
            (short, "another model"),
            (torn, "another model"),
            (good | {"ffn=0.5": good["full"].clone()}, "another family"),
            (good | {"nonsense": good["full"].clone()}, "another family"),
            ({"full": good["full"]}, "1 members"),
        ):
            (out / FILE).write_bytes(router_bytes(rows))
            with pytest.raises(ArtifactError, match=why):
                rg.load(out)
    finally:
        (out / FILE).write_bytes(kept)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (plan("0.2"), "members cost 0.33 to 1.00"),
        (plan(members="members: {}"), "members that have names"),
    ],
)
def test_a_budget_that_no_member_has(model: Path, tmp_path: Path, recipe: Plan, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        train(recipe, model, tmp_path / "out", TEXT, FEW)
    with pytest.raises(RecipeError, match=why):
        planned(recipe, model, TEXT, FEW)
    with pytest.raises(RecipeError, match=r"between 0 \(no router\) and 1"):
        plan("1.5")


def test_no_member_is_called_route() -> None:
    with pytest.raises(RecipeError, match="'route' is no name of a member"):
        plan(members="members: {route: 'depth=1'}")
