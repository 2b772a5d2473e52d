"""Families whose tokens choose neurons: what runs is, token by token, the layer of the share that the gate says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import regauge as rg
from regauge.artifact.gates import FILE, gates_bytes
from regauge.engine.extracting import extract
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_cost import planned
from regauge.engine.training_recipe import Asked
from regauge.errors import ArtifactError, RecipeError, SettingError
from regauge.hosts.transformers.gated import TokenLayer, chosen
from regauge.plan import Plan, parse
from tests.pico import pico, save
from tests.words import save_tokenizer, text

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_attention_heads": 4}
TEXT = [text(2000, seed) for seed in range(3)]
FEW = Asked(Amounts(tokens=512, length=32))
IDS = torch.arange(3, 25)[None].repeat(2, 1)
FORMAT = "grid: int8, grain: channel, ranger: absmax, scale: bf16, rounder: nearest"


def plan(gates: str = "0.6", family: str = "ffn: [0.5, 0.25], depth: [1]", more: str = "") -> Plan:
    return parse(f"name: g\nfamily: {{order: none, {family}}}\ntrain: {{steps: 2, batch: 128, gates: {gates}{more}}}\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = SIZES | {"num_key_value_heads": 2, "num_hidden_layers": 2}
    return save_tokenizer(save(pico("llama", **sizes), tmp_path_factory.mktemp("gates") / "model"))


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    trained = train(plan(), model, model.parent / "out", TEXT, FEW).trained
    assert trained is not None
    some = trained.gated
    assert some is not None
    assert list(some.shares) == ["1.0", "0.5", "0.25"]
    assert some.compute == pytest.approx(sum(float(name) * part for name, part in some.shares.items()))
    assert some.compute == pytest.approx(0.6, abs=0.15)
    assert set(some.alone) == {"full", "ffn=0.5", "ffn=0.25"}
    return model.parent / "out"


def run(model: Any, subnet: str) -> Tensor:
    with rg.use(model, subnet), torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def forced(out: Path, number: int) -> dict[int, Tensor]:
    """Gates of which every token chooses one share."""
    found = {int(block): torch.zeros_like(one) for block, one in load_file(out / FILE).items()}
    for gate in found.values():
        gate[number, -1] = 1.0
    return found


def family(out: Path, weights: str, tmp_path: Path, gates: dict[int, Tensor]) -> Any:
    """The family, or one in codes, with gates put beside it."""
    where = tmp_path / "made"
    rg.apply(
        parse(f"name: f\nfamily: {{order: none, ffn: [0.5, 0.25], depth: [1]}}\n{weights}"),
        out.parent / "model",
        where,
        quiet=True,
    )
    (where / FILE).write_bytes(gates_bytes(gates))
    return rg.load(where, dtype="float32")


@pytest.mark.parametrize("weights", ["", f"weights: {{blocks.*: {{{FORMAT}}}}}\n"], ids=["plain", "int8"])
def test_where_all_tokens_choose_one_share_it_is_that_member(out: Path, tmp_path: Path, weights: str) -> None:
    for number, subnet in enumerate(("full", "ffn=0.5", "ffn=0.25")):
        model = family(out, weights, tmp_path / str(number), forced(out, number))
        torch.testing.assert_close(run(model, "ffn=token"), run(model, subnet), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            run(model, "depth=1,ffn=token"),
            run(model, ",".join(("depth=1", subnet)[: 1 + (number > 0)])),
            rtol=1e-3,
            atol=1e-4,
        )
        with rg.use(model, "ffn=token"):
            model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_each_token_runs_through_the_layer_of_its_share(out: Path) -> None:
    model = rg.load(out, dtype="float32")
    layer = next(one for one in model.regauge.member("ffn=token").modules() if isinstance(one, TokenLayer))
    x_BTD = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y_BTD, each = layer(x_BTD), [one(x_BTD) for one in layer.layers]
    share_BT = chosen(layer.gate_KD, x_BTD.reshape(-1, 32)).view(3, 40)
    assert len(share_BT.unique()) > 1
    for number, whole in enumerate(each):
        torch.testing.assert_close(y_BTD[share_BT == number], whole[share_BT == number])


def test_what_has_no_gates_or_cannot_be_taken_out(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="in a family alone"):
        extract(out, "ffn=token", tmp_path / "x")
    with pytest.raises(SettingError, match="in a family alone"):
        rg.load(out, subnet="ffn=token")
    model = rg.load(out)
    model.regauge.learnt = type(model.regauge.learnt)()
    with pytest.raises(SettingError, match="regauge learn adaptive-computation"), rg.use(model, "ffn=token"):
        pass
    with pytest.raises(SettingError, match="ffn=tokens of a subnet is not a share"), rg.use(model, "ffn=tokens"):
        pass


def test_gates_of_another_family_are_refused(out: Path) -> None:
    good = {int(key): one.clone() for key, one in load_file(out / FILE).items()}
    kept = (out / FILE).read_bytes()
    try:
        for gates, why in (
            ({0: good[0]}, "no gate for each of the 2 blocks"),
            (good | {1: good[1][:, :5].clone()}, "another family"),
            (good | {1: good[1][:2].clone()}, "another family"),
            (good | {1: good[1] * float("inf")}, "another family"),
        ):
            (out / FILE).write_bytes(gates_bytes(gates))
            with pytest.raises(ArtifactError, match=why):
                rg.load(out)
    finally:
        (out / FILE).write_bytes(kept)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (plan("0.2"), "members cost 0.25 to 1.00"),
        (plan(family="depth: [1]"), "say family: {ffn"),
        (plan(more=", rank: 2", family="ffn: [0.5], bits: [3]"), "neither rank nor an encoder"),
    ],
)
def test_a_training_that_has_no_gates(model: Path, tmp_path: Path, recipe: Plan, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        train(recipe, model, tmp_path / "out", TEXT, FEW)
    with pytest.raises(RecipeError, match=why):
        planned(recipe, model, TEXT, FEW)
