"""Equivalence that is learnt: exact wherever it stands, its start at a rate of 0, and better than start and nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regauge.anatomy.model import Anatomy
from regauge.engine import apply
from regauge.engine.job import prepare
from regauge.engine.learning import learnt_streams
from regauge.engine.work import Pass
from regauge.errors import RecipeError
from regauge.formats.base import Format
from regauge.formats.grains import Token
from regauge.formats.grids import Int
from regauge.formats.rangers import Dynamic
from regauge.formats.readings import dynamic
from regauge.formats.scales import Float32
from regauge.hosts.transformers.source import Source
from regauge.learn.base import Trial
from regauge.plan import parse
from regauge.rewrites import LearntEquivalence
from regauge.text.calibration import Calibration
from tests.pico import SMALL, pico, save
from tests.words import save_tokenizer, text

ALL = "norm+value+ffn+qk"
READ: dict[str, Any] = {"calibration": [text(2000)], "tokens": 512, "length": 32}
POINTS = (
    "weights:\n  blocks.*: {grid: int4, grain: channel, ranger: 'learnt-clip:0.05', scale: bf16}\n"
    "inputs:\n  blocks.*: {transform: identity, grid: int4, grain: token}\n"
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    model = save_tokenizer(save(pico("llama", **SMALL), folder / "model"))
    apply(parse("name: planted\nrewrites: ['plant-outliers:16']\n"), model, folder / "out")
    return folder / "out"


def errors(model: Path, out: Path, *rewrites: str) -> list[float]:
    """What is left of each block's error after training."""
    learning = "learning: {steps: 48, batch: 128, schedule: cosine, patience: 0}"
    plan = parse(f"name: taught\n{learning}\nrewrites: [{', '.join(rewrites)}]\n{POINTS}")
    return [float(str(entry["after"])) for entry in apply(plan, model, out, **READ).learnt]


def test_what_is_learnt_beats_its_start_and_nothing(planted: Path, tmp_path: Path) -> None:
    part = f"{{part: learnt-equivalence, streams: {ALL}, rate: %s}}"
    none = errors(planted, tmp_path / "none")
    start = errors(planted, tmp_path / "start", part % 0.0)
    learnt = errors(planted, tmp_path / "learnt", part % 0.02)
    assert start[0] < 0.6 * none[0]  # statistics take the planted outliers back
    assert learnt[0] < 0.9 * start[0]
    assert learnt[1] < start[1] < none[1]


def test_training_alone_finds_the_scales(planted: Path, tmp_path: Path) -> None:
    """From scales of 1: the gradient knows that a loud channel widens the step of every other."""
    part = f"{{part: learnt-equivalence, alpha: none, streams: {ALL}, rate: 0.1}}"
    assert errors(planted, tmp_path / "learnt", part)[0] < 0.6 * errors(planted, tmp_path / "none")[0]


@pytest.mark.parametrize("matrix", [False, True], ids=["scales", "matrix"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "gpt2", "gpt_neox", "qwen3", "mixtral", "bert"])
def test_wherever_training_goes_the_function_stays(family: str, matrix: bool, tmp_path: Path) -> None:
    model = save(pico(family), tmp_path / "model")
    option = f"{{part: learnt-equivalence, alpha: none, streams: {ALL}, matrix: {str(matrix).lower()}}}"
    job = prepare(parse(f"name: t\nlearning: {{steps: 1}}\nrewrites: [{option}]\n{POINTS}"), Source.open(model))
    assert job is not None
    work = Pass(job, Calibration(torch.arange(2 * 16).reshape(2, 16) % 23, "counting"))
    outer = work.read(None)
    work.begin(outer.stored, outer.exact)
    moved, *_ = work.local(0, work.read(0))
    (streams,) = learnt_streams(job, 0).values()
    generator = torch.Generator().manual_seed(3)
    found = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float32)
        for name, value in streams.init(Trial(moved.exact)).items()
    }
    assert found
    assert {name.rpartition(" ")[2] for name in found} >= ({"scale", "matrix"} if matrix else {"scale"})
    tried = streams.apply(found, Trial({name: tensor.float() for name, tensor in moved.exact.items()}), 1.0)
    assert any(not torch.equal(tried.weights[name], moved.exact[name].float()) for name in moved.exact)
    moves = streams.finish(found, Trial(moved.exact)).moves
    runner, states = work.running()
    forms = moved.exact, dict(tried.weights), work.moved(moved, moves).exact
    whole, *others = (runner.bind(0, weights, states)(states.hidden[0], 0).double() for weights in forms)
    assert all(float((whole - other).square().sum() / whole.square().sum()) < 1e-8 for other in others)


def test_biases_are_shifted_and_others_are_not(tmp_path: Path) -> None:
    found = {
        family: {name.rpartition(" ")[2] for name in LearntEquivalence().init(anatomy_of(family, tmp_path), 0)}
        for family in ("gpt2", "llama")
    }
    assert found == {"gpt2": {"scale", "shift"}, "llama": {"scale"}}


def anatomy_of(family: str, folder: Path) -> Anatomy:
    return Source.open(save(pico(family), folder / family)).anatomy


def test_rotary_pairs_share_a_scale(tmp_path: Path) -> None:
    rewrite, anatomy = LearntEquivalence(streams="qk"), anatomy_of("phi3", tmp_path)
    assert {tuple(value.shape) for value in rewrite.init(anatomy, 0).values()} == {(10 - 2,)}  # 4 of 10 channels turn


def test_the_gradient_of_a_reading_sees_its_step() -> None:
    """The loudest channel alone makes the step; moving it moves every code's value. By hand: x = (7.5, 0.4, 2.2), step
    1, codes (7, 0, 2) since 7.5 is beyond the grid; the sum is 9 steps, and the step is the first of 7.5."""
    x_TI = torch.tensor([[7.5, 0.4, 2.2]], dtype=torch.float32, requires_grad=True)
    reading = dynamic(Format(Int(4), Token(), Dynamic(), Float32()))
    y_TI = reading.passed(x_TI)
    assert torch.equal(y_TI, reading.simulate(x_TI))
    (gradient,) = torch.autograd.grad(y_TI.sum(), x_TI)
    step = (7 + (0 - 0.4) + (2 - 2.2)) / 7.5
    assert gradient[0].tolist() == pytest.approx([step, 1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rate": -1.0}, "a learning rate is 0 or more"),
        ({"alpha": "some"}, "alpha is a number or 'none', not 'some'"),
        ({"streams": "norm+heads"}, "'heads' is no kind of stream that it moves"),
    ],
)
def test_refusals(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        LearntEquivalence(**options)
