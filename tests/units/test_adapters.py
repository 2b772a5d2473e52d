"""Adapters of a family of several precisions: trained beside codes that stay, and the same wherever a member runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regauge as rg
from regauge.artifact.adapters import FILE, adapters_bytes
from regauge.engine.extracting import extract
from regauge.engine.recovery_text import Amounts
from regauge.engine.training import train
from regauge.engine.training_cost import planned
from regauge.engine.training_recipe import Asked
from regauge.errors import ArtifactError, RecipeError, RegaugeError, TextError
from regauge.hosts.teaching import Beside
from regauge.hosts.transformers.adapting import adapting
from regauge.plan import Plan, parse
from tests.families import given, same
from tests.pico import pico, save
from tests.words import save_tokenizer, text

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
WEIGHTS = (
    "weights: {blocks.*: {grid: nested:8, grain: group:32, ranger: minmax, scale: f16-levels:3, rounder: nearest}}\n"
)
TRAIN = (
    "train: {sampler: balanced:1, layers: each, rank: 2, rate: 0.05, steps: 4, batch: 128, distiller: none, "
    "labels: 1}\n"
)
FAMILY = "family: {order: none, bits: [4, 3, 2], depth: [1], ffn: [0.67]}\n"
TEXT = [text(2000, seed) for seed in range(3)]
FEW = Asked(Amounts(tokens=512, length=32))


def plan(weights: str = WEIGHTS, training: str = TRAIN, family: str = FAMILY) -> Plan:
    return parse(f"name: q\n{family}{training}calibration: {{tokens: 512, length: 32}}\n{weights}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save(pico("llama", **SIZES), tmp_path_factory.mktemp("adapters") / "model"))


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    told = train(plan(), model, model.parent / "out", TEXT, FEW).trained
    assert told is not None
    assert told.members["full"].before == told.members["full"].after
    assert told.members["bits=2"].after < told.members["bits=2"].before
    return model.parent / "out"


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=2e-3) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_member_has_its_adapters_wherever_it_runs(out: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = rg.load(out, dtype=dtype)
    for number, subnet in enumerate(("bits=4/2", "depth=1,bits=2", "ffn=0.67,bits=3")):
        extract(out, subnet, tmp_path / str(number))
        with rg.use(model, subnet):
            found = given(model)
        assert same(found, given(rg.load(tmp_path / str(number), dtype=dtype))), subnet
        assert same(found, given(rg.load(out, dtype=dtype, subnet=subnet))), subnet


def test_each_precision_has_its_own_and_the_whole_none(out: Path, model: Path, tmp_path: Path) -> None:
    family = rg.load(out, dtype="float32")
    rg.apply(parse(f"name: q\n{FAMILY}{WEIGHTS}"), model, tmp_path / "bare", quiet=True)
    plain = rg.load(tmp_path / "bare", dtype="float32")
    assert same(given(family), given(plain))
    factors = load_file(out / FILE)
    assert {key.partition("|")[0] for key in factors} == {"4", "3", "2"}
    kept = {key: one if key.startswith("3") else torch.zeros_like(one) for key, one in factors.items()}
    (tmp_path / "bare" / FILE).write_bytes(adapters_bytes(kept))
    three = rg.load(tmp_path / "bare", dtype="float32")
    for subnet, other in (("bits=3", family), ("bits=2", plain)):
        found, wanted, bare = ([], [], [])
        for one, seen in ((three, found), (other, wanted), (plain, bare)):
            with rg.use(one, subnet):
                seen += given(one)
        assert close(found, wanted), subnet
        assert close(found, bare) == (other is plain), subnet


def test_members_are_counted_with_their_adapters(out: Path, tmp_path: Path) -> None:
    sizes = {one.subnet: one.bytes for one in rg.subnets(out, ["full", "bits=2"], quiet=True).members}
    done = extract(out, "bits=2", tmp_path / "x")
    assert done.bytes == pytest.approx(sizes["bits=2"], rel=0.02)
    assert sizes["bits=2"] < sizes["full"]


@pytest.mark.parametrize(
    ("recipe", "words", "error", "why"),
    [
        (plan(training=TRAIN.replace("rank: 2", "rank: 0")), TEXT, RecipeError, "say train: {rank: 8}"),
        (plan(family="family: {depth: [1]}\n"), TEXT, RecipeError, "its family offers one: say family: {bits"),
        (
            plan(WEIGHTS.replace("nested:8", "int8-asym").replace("f16-levels:3", "f16-low")),
            TEXT,
            RecipeError,
            "nested:8",
        ),
        (plan(""), TEXT, RecipeError, "give them grid: nested:8"),
        (plan(), ["too short"], TextError, "too few to hold some out"),
    ],
)
def test_what_has_no_adapters(
    model: Path, tmp_path: Path, recipe: Plan, words: list[str], error: type[RegaugeError], why: str
) -> None:
    with pytest.raises(error, match=why):
        train(recipe, model, tmp_path / "out", words, FEW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("training", "why"),
    [
        ("rank: -1", "the rank of adapters is 0"),
        ("rank: 9999", "the rank of adapters is 0"),
        ("rank: 2, adapters: one", "adapters is one of each, shared"),
        ("rank: 2, teacher: largest", "teacher is original"),
    ],
)
def test_what_a_recipe_may_get_wrong(training: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        plan(training=f"train: {{{training}}}\n")


def test_a_file_that_does_not_fit_is_refused(out: Path, tmp_path: Path) -> None:
    good = {key: one.clone() for key, one in load_file(out / FILE).items()}
    kept = (out / FILE).read_bytes()
    name = "3|blocks.0.attn.q|left"
    try:
        for key, tensor in (
            (name, good[name][:5]),
            (name, good[name].expand(64, 2) * float("nan")),
            (name, torch.zeros(64, 65)),
            (name.replace("3|", "9|"), good[name]),
            (name.replace("attn.q", "attn.z"), good[name]),
            (name.replace("left", "middle"), good[name]),
        ):
            (out / FILE).write_bytes(adapters_bytes(good | {key: tensor.clone()}))
            with pytest.raises(ArtifactError, match="does not fit the model"):
                rg.load(out)
        (out / FILE).write_bytes(adapters_bytes({key: one for key, one in good.items() if key != name}))
        with pytest.raises(ArtifactError, match=r"3 bits of blocks\.0\.attn\.q"):
            rg.load(out)
    finally:
        (out / FILE).write_bytes(kept)


def test_adapters_that_all_share_are_written_for_each(out: Path, model: Path) -> None:
    made = adapting(out, model, Beside(2, shared=True))
    assert made.bits == (4, 3, 2)
    assert {key.partition("|")[0] for key in made.parameters} == {"0"}
    stored = made.stored(made.parameters)
    assert {key.partition("|")[0] for key in stored} == {"4", "3", "2"}
    assert len(stored) == 3 * len(made.parameters)


def test_what_it_would_cost_is_told(model: Path) -> None:
    told = planned(plan(), model, TEXT, FEW)
    assert told.choices == "bits (3)"
    assert told.passes == 1.0
