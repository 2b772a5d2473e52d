"""A learnt transform of an input: exact before anything is rounded, its null at a rate of 0, and better than it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regauge.artifact.reader import open_artifact
from regauge.engine import apply
from regauge.formats.base import Format
from regauge.formats.grains import Channel, Token
from regauge.formats.grids import Int
from regauge.formats.kronecker import LearntKronecker, factors
from regauge.formats.rangers import AbsMax, Dynamic
from regauge.formats.readings import dynamic
from regauge.formats.scales import BFloat16, Float32
from regauge.formats.transforms import Hadamard
from regauge.hosts.transformers.load import load
from regauge.learn.base import Parameters, Taught, Trial
from regauge.learn.loop import train
from regauge.learn.settings import Settings
from regauge.learn.sites import OnTap, on_sites
from regauge.plan import parse
from tests.lessons import OneMatrix
from tests.pico import pico, save
from tests.words import save_tokenizer, text

WEIGHTS = Format(Int(4), Channel(), AbsMax(), BFloat16())
INPUTS = Format(Int(4), Token(), Dynamic(), Float32())


def inputs(tokens: int = 128, channels: int = 24) -> Tensor:
    """A few loud channels, in a pattern that no Hadamard knows of."""
    x_TI = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(1))
    x_TI[:, [1, 2, 9]] *= torch.tensor([20.0, -30.0, 12.0])
    return x_TI


@dataclass(frozen=True, eq=False)
class Linear(OneMatrix):
    """One matrix as a block: the error of what it makes of its rounded input."""

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        return self._error(parameters, self.x_TI.chunk(2)[batch])

    def error(self, parameters: Parameters) -> float:
        return float(self._error(parameters, self.x_TI))

    def _error(self, parameters: Parameters, x_TI: Tensor) -> Tensor:
        tried = self.parts.apply(parameters, self.trial, 1.0)
        y_TO = tried.inputs["w"](x_TI) @ tried.weights["w.weight"].T
        target_TO = x_TI @ self.trial.weights["w.weight"].T
        return (y_TO - target_TO).square().sum() / target_TO.square().sum()


def linear(maker: LearntKronecker) -> Linear:
    w_OI = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.3, 2, 24)
    taps = [OnTap("in", ("w",), 24, INPUTS, maker)]
    return Linear(on_sites({"w": Taught()}, {"w": WEIGHTS}, taps=taps), Trial({"w.weight": w_OI}), inputs())


def plain(transform: Any) -> float:
    """The error with a transform that is not learnt, by the quantiser alone."""
    found = linear(LearntKronecker())
    w_OI, x_TI = found.trial.weights["w.weight"], found.x_TI
    folded_OI = transform.inverse_on(w_OI)
    y_TO = dynamic(INPUTS, transform).simulate(x_TI) @ WEIGHTS.decode(WEIGHTS.encode(folded_OI)).T
    target_TO = x_TI @ w_OI.T
    return float((y_TO - target_TO).square().sum() / target_TO.square().sum())


def test_the_factors_are_those_nearest_to_a_square() -> None:
    assert [factors(n) for n in (24, 64, 704, 29)] == [(4, 6), (8, 8), (22, 32), (1, 29)]


def test_at_a_rate_of_0_it_is_what_it_began_with() -> None:
    for start in ("identity", "hadamard"):
        found = linear(LearntKronecker(0.0, start))
        state = train(found, Settings(steps=4, batch=64))
        assert state.least == pytest.approx(plain(LearntKronecker(start=start).fit(24, {}, [])), rel=1e-4)
    x_TI = inputs()
    assert torch.equal(LearntKronecker(start="identity").fit(24, {}, []).forward(x_TI), x_TI)


def test_what_is_learnt_beats_the_hadamard() -> None:
    state = train(linear(LearntKronecker(0.02)), Settings(steps=120, batch=64, schedule="cosine", patience=0))
    assert state.least < 0.7 * plain(Hadamard().fit(24, {}, []))
    assert state.least < 0.7 * plain(LearntKronecker().fit(24, {}, []))


def test_the_inverse_is_in_the_weights() -> None:
    found = linear(LearntKronecker())
    begins = {
        name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        for name, value in found.init().items()
    }
    transform = found.parts.finish(begins, found.trial).transforms["in"]
    x_TI, w_OI = inputs().double(), found.trial.weights["w.weight"].double()
    assert torch.allclose(transform.forward(x_TI) @ transform.inverse_on(w_OI).T, x_TI @ w_OI.T, rtol=1e-9)


def test_an_artifact_holds_it_and_runs_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = save_tokenizer(save(pico("llama", **sizes), tmp_path / "model"))
    read: dict[str, Any] = {"calibration": [text(1500)], "tokens": 256, "length": 32}
    recipe = (
        "name: turned\nlearning: {steps: 24, batch: 128, schedule: cosine, patience: 0}\n"
        "weights:\n  blocks.*: {grid: int4, grain: channel}\n"
        "inputs:\n  blocks.*: {transform: 'kronecker:0.01', grid: int4, grain: token}\n"
    )
    told: list[Any] = list(apply(parse(recipe), model, tmp_path / "out", **read).learnt)
    assert told[0]["after"] < told[0]["before"]
    assert told[1]["after"] <= told[1]["before"]
    assert all(len(one["taps"]) == 4 for one in told)
    kept = open_artifact(tmp_path / "out").block(1).extras
    assert kept["blocks.1.mlp.hidden.left"].shape == (6, 6)
    assert kept["blocks.1.mlp.hidden.right"].shape == (8, 8)
    bent = torch.eye(8) + 0.2 * torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(LearntKronecker, "_begin", lambda self, size: bent[:size, :size])  # no rotation
    apply(parse(recipe.replace("int4", "int8").replace("steps: 24", "steps: 1")), model, tmp_path / "eight", **read)
    ids = torch.arange(24).reshape(2, 12) % 50
    whole, found = (load(path, dtype=torch.float32)(ids).logits for path in (model, tmp_path / "eight"))
    assert float((found - whole).square().sum() / whole.square().sum()) < 1e-2  # a wrong inverse leaves nothing of them


def test_gptq_rounds_in_the_basis_that_was_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second moments are those of the input behind the transform, which here is no rotation."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = save_tokenizer(save(pico("llama", **sizes), tmp_path / "model"))
    bent = torch.eye(8) + 0.2 * torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(LearntKronecker, "_begin", lambda self, size: bent[:size, :size])
    ids = torch.arange(48).reshape(4, 12) % 50
    whole = load(model, dtype=torch.float32)(ids).logits
    errors = {}
    for rounder in ("nearest", "gptq-ordered"):
        recipe = (
            "name: turned\nlearning: {steps: 1, batch: 128}\n"
            f"weights:\n  blocks.*: {{grid: int4, grain: channel, rounder: {rounder}}}\n"
            "inputs:\n  blocks.*: {transform: 'kronecker:0.0', grid: int8, grain: token}\n"
        )
        apply(parse(recipe), model, tmp_path / rounder, calibration=[text(1500)], tokens=512, length=32)
        errors[rounder] = float((load(tmp_path / rounder, dtype=torch.float32)(ids).logits - whole).square().sum())
    assert errors["gptq-ordered"] < 0.95 * errors["nearest"]  # 0.85 of it; by those of the input itself 2.3
