"""Training at the scope of the model: that what was trained is what is loaded, resuming, what is refused; and the trace
of every product."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event, Thread, get_ident
from typing import Any

import pytest
import torch

import regauge as rg
from regauge.artifact.cutting import opened
from regauge.artifact.files import read
from regauge.cli import main
from regauge.engine import apply
from regauge.engine.watchdog import Progress
from regauge.errors import BudgetError, ExactnessError, RecipeError, RegaugeError
from regauge.formats.base import Format
from regauge.formats.grains import Whole
from regauge.formats.grids import Int
from regauge.formats.learnt_steps import LearntStatic
from regauge.formats.readings import Reading
from regauge.formats.scales import Float32
from regauge.hosts.transformers.source import read_tokenizer
from regauge.hosts.transformers.tracing import traced
from regauge.kernels.cpu import coded
from regauge.plan import dump, parse
from regauge.text.calibration import draw
from regauge.text.corpora import corpus
from tests.pico import SMALL, pico, save
from tests.words import save_tokenizer, text

TEXT = [text(2000)]
READ: dict[str, Any] = {"calibration": TEXT, "tokens": 320, "length": 32}
STATIC = "{grid: int6-asym, grain: tensor, ranger: 'learnt-static:0.02', scale: f32}"
DYNAMIC = "{grid: int8, grain: token, ranger: dynamic, scale: f32}"
CLIPPED = "{grid: int4, grain: channel, ranger: 'learnt-clip:0.05', scale: f32}"
PLAIN = "{grid: int8, grain: channel, scale: f32}"
INNER = "blocks.*.attn.{queries,keys,values,probabilities}"


def recipe(weights: str = "", inputs: str = "", head: str = STATIC, steps: int = 8, first: str = "") -> Any:
    """Every product of integers, unless told otherwise."""
    return parse(
        f"name: whole\n{first}learning: {{scope: model, steps: {steps}, batch: 64, patience: 0}}\n"
        f"rewrites: ['learnt-scales:0.02']\nweights:\n  blocks.*: {CLIPPED}\n  embed: {PLAIN}\n{weights}"
        f"inputs:\n  blocks.*: {STATIC}\n  {INNER}: {STATIC}\n  head.in: {head}\n{inputs}"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save(pico("llama-tied", **SMALL), tmp_path_factory.mktemp("whole") / "model"))


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    apply(recipe(first="products: integer\n"), model, out, **READ)
    return out


def contents(out: Path) -> dict[str, bytes]:
    files = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    files.pop("regauge/run-log.json")
    return files


def test_what_was_trained_is_what_is_loaded(model: Path, made: Path) -> None:
    """The error on the windows held out, taken again with the loaded model: its tied head and attention included."""
    told = json.loads((made / "regauge/receipt.json").read_text(encoding="utf-8"))["learnt"][0]
    windows = draw(corpus(TEXT), read_tokenizer(model), READ["tokens"], READ["length"], 0, True)
    aside = torch.cat(windows.batches(64)[-1:])
    original, found = (rg.load(path, dtype="float32")(aside).logits.log_softmax(-1) for path in (model, made))
    kl = float((original.exp() * (original - found)).sum(-1).mean())
    assert told["held_out"] == aside.numel()
    assert kl == pytest.approx(told["after"], rel=0.02)
    assert told["after"] < told["before"]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(model: Path, made: Path, tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.phase == "learning the whole model" and event.done == 5:
            raise BudgetError("stopped")

    plan = recipe(first="products: integer\n")
    with pytest.raises(BudgetError, match="stopped"):
        apply(plan, model, tmp_path / "out", progress=stop, **READ)
    begun: list[int] = []

    def look(event: Progress) -> None:
        if event.phase == "learning the whole model":
            begun.append(event.done)

    apply(plan, model, tmp_path / "out", progress=look, **READ)
    assert min(begun) >= 5
    assert contents(tmp_path / "out") == contents(made)


def test_a_model_without_a_head_learns_what_it_gives(tmp_path: Path) -> None:
    model = save_tokenizer(save(pico("llama-headless", **SMALL), tmp_path / "model"))
    plan = parse(
        "name: headless\nlearning: {scope: model, steps: 8, batch: 64, patience: 0}\n"
        f"weights:\n  blocks.*: {CLIPPED}\ninputs:\n  blocks.*: {STATIC}\n"
    )
    (told,) = apply(plan, model, tmp_path / "out", **READ).learnt
    assert 0 < told["after"] < told["before"]  # type: ignore[operator]  # numbers


def test_a_step_in_training_is_the_step_that_is_loaded() -> None:
    """To the bit; and by hand: half the scale and a zero point a quarter of the grid further."""
    fmt = Format(Int(4, False), Whole(), LearntStatic(), Float32())
    step = fmt.ranger(torch.tensor([[-1.0, 2.0]]), fmt.grid, fmt.scale)
    assert float(step.scale_G1) == pytest.approx(0.2)
    assert float(step.zero_G1) == 5  # type: ignore[arg-type]  # it has one
    moved = LearntStatic().apply({"scale": torch.tensor([[0.5]]).log(), "zero": torch.tensor([[0.25]])}, step, fmt)
    assert float(moved.scale_G1) == pytest.approx(0.1)
    assert float(moved.zero_G1) == 9  # type: ignore[arg-type]  # 5 + 0.25 · 15, rounded
    assert moved.fields["zero"].tolist() == [[9]]
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    soft, hard = Reading(fmt, step=moved, soft=True), Reading(fmt, step=moved)
    assert torch.equal(soft.simulate(x), hard.simulate(x))


@pytest.mark.parametrize(
    ("text_", "message"),
    [
        (
            f"rewrites: [learnt-scales]\nweights: {{blocks.*: {PLAIN}}}\n",
            r"rewrite 'learnt-scales' is learnt by the whole model's output: write 'learning: \{scope: model\}'",
        ),
        (
            f"weights: {{blocks.*: {PLAIN}}}\ninputs: {{blocks.*.attn.keys: {STATIC}}}\n",
            r"the step of blocks\.0\.attn\.keys is learnt by the whole model's output",
        ),
        (
            "learning: {scope: model}\nweights: {blocks.*: {grid: int4, grain: channel, rounder: learnt-side}}\n",
            "rounder 'learnt-side' is learnt block by block",
        ),
        (
            f"learning: {{scope: model}}\nrewrites: [learnt-scales]\nweights: {{blocks.*: {PLAIN}}}\n"
            "inputs: {blocks.*: {transform: hadamard, grid: int8, grain: token}}\n",
            "rewrite 'learnt-scales' scales the channels that 'hadamard' mixes",
        ),
        ("learning: {scope: planet}\n" + f"weights: {{blocks.*: {CLIPPED}}}\n", "the scope is one of block, model"),
    ],
)
def test_what_a_scope_cannot_train_is_a_sentence(text_: str, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RegaugeError, match=message):
        apply(parse(f"name: refused\n{text_}"), model, tmp_path / "out", **READ)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"inputs": f"  blocks.*.mlp.in: {DYNAMIC}\n"},
            r"of integers, and a norm's output has a step of each call's own, and integers alone want a static one: "
            r"blocks\.0\.mlp\.in, blocks\.1\.mlp\.in",
        ),
        ({"head": "full"}, r"a norm's output has no reading: head\.in"),
        (
            {"inputs": "  blocks.1.attn.keys: full\n"},
            r"what attention multiplies has no reading: blocks\.1\.attn\.keys",
        ),
        ({"weights": "  blocks.0.mlp.down: {grid: nf4, grain: channel}\n"}, r"no integers: blocks\.0\.mlp\.down"),
    ],
)
def test_a_promise_of_integers_that_a_model_cannot_keep_is_a_sentence(
    changes: dict[str, str], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        apply(recipe(first="products: integer\n", **changes), model, tmp_path / "out", **READ)


def test_a_recipe_promises_integers_or_nothing() -> None:
    plan = recipe(first="products: integer\n")
    assert parse(dump(plan)) == plan
    with pytest.raises(RecipeError, match="products are integer, or nothing is said of them"):
        recipe(first="products: floats\n")


def test_every_product_of_an_integer_model_is_one_of_integers(made: Path) -> None:
    found = rg.trace(made, integers=True)
    assert found.integer
    assert found.static
    assert len(found.products) == 2 * (7 + 2) + 1  # sites and attention's two of each block, and the tied head
    names = {one.name: one for one in found.products}
    assert names["blocks.1.attn.scores"].inputs == names["head"].inputs == "int6-asym, static"
    assert {one.runs for one in found.products if ".attn.s" in one.name} == {"simulated"}
    sites = {one.runs for one in found.products if ".attn.s" not in one.name}
    assert sites == {"native" if coded.here() else "simulated"}


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"weights": "  blocks.1.mlp.down: full\n", "inputs": "  blocks.1.mlp.hidden: full\n"},
         "blocks.1.mlp.down", "its weights are in full precision"),
        ({"inputs": "  blocks.0.mlp.hidden: full\n"}, "blocks.0.mlp.down", "its inputs are not rounded"),
        ({"inputs": "  blocks.0.attn.keys: full\n"}, "blocks.0.attn.scores", "keys are not rounded"),
        ({"inputs": "  blocks.0.mlp.hidden: {grid: fp8, grain: token}\n"}, "blocks.0.mlp.down", "no grid of integers"),
    ],
)  # fmt: skip
def test_one_product_of_floats_is_named(
    changes: dict[str, str], name: str, why: str, model: Path, tmp_path: Path
) -> None:
    apply(recipe(steps=1, **changes), model, tmp_path / "out", **READ)
    found = rg.trace(tmp_path / "out")
    assert not found.integer
    assert [(one.name, one.runs) for one in found.floats] == [(name, "float")]
    assert why in found.floats[0].why
    with pytest.raises(ExactnessError, match=rf"1 of the 19 products of .* are not of integers: {name} \(.*{why}"):
        rg.trace(tmp_path / "out", integers=True)


@pytest.mark.parametrize("first", [True, False], ids=["begun first, done first", "begun first, done last"])
def test_two_threads_trace_one_model_at_once_and_see_their_own(made: Path, first: bool) -> None:
    model, anatomy, ids_BT = rg.load(made, dtype="float32"), opened(made).layout.anatomy, torch.arange(3, 20)[None]
    alone, prepared = traced(model, anatomy, ids_BT), Reading.prepared
    one, within, on, found = get_ident(), Event(), Event(), []
    other = Thread(target=lambda: found.append(traced(model, anatomy, ids_BT)))

    def begin(*_: object) -> None:
        if get_ident() != one:
            within.set()
            assert on.wait(10)
            return
        other.start()
        assert within.wait(10)

    def end(*_: object) -> None:
        if get_ident() == one and not first:
            on.set()
            other.join(10)

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(hook)
        for path, hook in (("model.layers.0.mlp", begin), ("model.layers.1.mlp", end))
    ]
    try:
        beside = traced(model, anatomy, ids_BT)
    finally:
        on.set()
        other.join(10)
        for hook in hooks:
            hook.remove()
    assert [beside, *found] == [alone, alone]
    assert Reading.prepared is prepared  # which a trace must not change for others


def test_a_trace_looks_at_values_and_not_at_the_recipe(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reading leaves unrounded is found out, where kernels do not take its codes."""
    monkeypatch.setattr(Reading, "simulate", lambda self, x: x)
    monkeypatch.setattr(coded, "here", lambda: False)
    found = rg.trace(made)
    assert len(found.floats) == len(found.products)
    assert all("not on the grid" in one.why for one in found.floats)


def test_native_products_of_bytes_are_told_apart_from_simulated_ones(model: Path, tmp_path: Path) -> None:
    rg.apply("rtn-w8a8", model, tmp_path / "out", quiet=True)
    found = rg.trace(tmp_path / "out")
    runs = {one.name: one.runs for one in found.products}
    assert runs["blocks.0.mlp.up"] == "native"
    assert runs["blocks.0.attn.scores"] == "float"
    assert not found.static


def test_the_command_fails_where_the_promise_does(made: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(made), "--integers"]) == 0
    said = capsys.readouterr().out
    how = "15 native, 4 simulated" if coded.here() else "19 simulated"
    assert f"19 of 19 products are of integers ({how}); every step is static." in said
    assert main(["trace", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["products"][0]["runs"] == "float"
    assert main(["trace", str(model), "--integers"]) != 0
    assert "19 of the 19 products" in " ".join(capsys.readouterr().err.split())


def test_a_tied_head_rounds_its_input_where_a_recipe_says_so(model: Path, tmp_path: Path) -> None:
    """By hand: the loaded model's last states, rounded, times its table."""
    plan = parse(f"name: tied\nweights: {{embed: {PLAIN}}}\ninputs: {{head.in: {{grid: int3, grain: token}}}}\n")
    apply(plan, model, tmp_path / "out")
    found: Any = rg.load(tmp_path / "out", dtype="float32")
    ids = torch.arange(3, 20)[None]
    states = found.model(ids).last_hidden_state
    scale = states.abs().amax(-1, keepdim=True) / 3.5
    rounded = (states / scale).round().clamp(-4, 3) * scale
    table = found.get_input_embeddings()(torch.arange(53))
    assert torch.allclose(found(ids).logits, rounded @ table.T, atol=1e-4)


def test_every_tensor_of_an_integer_artifact_is_read_again(made: Path) -> None:
    kept = {name for path in made.glob("*.safetensors") for name in read(path)}
    assert {"head.in.scale", "head.in.zero", "blocks.1.attn.probabilities.scale"} <= kept
