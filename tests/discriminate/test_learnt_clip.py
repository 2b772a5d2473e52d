"""Learnt clipping: what it begins with, that training is what helps, and that what comes out is an ordinary step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.errors import RecipeError
from regauge.formats.base import Format, Step
from regauge.formats.grains import Channel, Group
from regauge.formats.grids import E2M1, NF4, Int
from regauge.formats.learnt import LearntClip, straight_through
from regauge.formats.rangers import MinMax
from regauge.formats.scales import BFloat16, Float32, PowerOfTwo
from regauge.learn.base import Parameters, Taught, Trial
from regauge.learn.loop import State, train
from regauge.learn.settings import Settings
from regauge.learn.sites import on_sites
from regauge.rounding.rounders import GPTQ, Nearest
from tests.lessons import OneMatrix

FORMATS = [
    Format(Int(2, False), Group(8), LearntClip(), BFloat16()),
    Format(Int(3), Group(8), LearntClip(), BFloat16()),
    Format(Int(4, False), Channel(), LearntClip(), Float32()),
    Format(E2M1(), Group(8), LearntClip(), Float32()),
    Format(NF4(), Group(8), LearntClip(), BFloat16()),
]
STORED = [*FORMATS, Format(E2M1(), Group(8), LearntClip(), PowerOfTwo())]


def named(fmt: Format) -> str:
    return f"{fmt.grid.name} {fmt.scale.name}"


def weights(rows: int = 12, columns: int = 32, seed: int = 0) -> Tensor:
    """One loud weight in every group of eight, whose input is quiet: clipping it is worth it."""
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w_OI[:, ::8] *= 6
    return w_OI


def inputs(tokens: int = 96, columns: int = 32, seed: int = 1) -> Tensor:
    x_TI = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x_TI[:, ::8] *= 0.05
    return x_TI


@dataclass(frozen=True, eq=False)
class Linear(OneMatrix):
    """One matrix as a block: the error of X Ŵᵀ against X Wᵀ, in two batches."""

    attached: bool = True

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        kept = parameters if self.attached else {name: value.detach() for name, value in parameters.items()}
        return self._error(kept, self.x_TI.chunk(2)[batch])

    def error(self, parameters: Parameters) -> float:
        return float(self._error(parameters, self.x_TI))

    def _error(self, parameters: Parameters, x_TI: Tensor) -> Tensor:
        w_OI = self.trial.weights["w.weight"]
        w_hat_OI = self.parts.apply(parameters, self.trial, 0.0).weights["w.weight"]
        found: Tensor = ((w_OI - w_hat_OI) @ x_TI.T).square().sum() / (w_OI @ x_TI.T).square().sum()
        return found


def problem(fmt: Format, rate: float = 0.01, w_OI: Tensor | None = None, attached: bool = True) -> Linear:
    trial = Trial({"w.weight": weights() if w_OI is None else w_OI})
    return Linear(on_sites({"w": Taught(LearntClip(rate))}, {"w": fmt}), trial, inputs(), attached)


def trained(fmt: Format, steps: int = 120, rate: float = 0.05) -> tuple[State, Linear]:
    found = problem(fmt, rate)
    return train(found, Settings(steps=steps, patience=0)), found


def error(w_hat_OI: Tensor) -> float:
    return float(((weights() - w_hat_OI) @ inputs().T).square().sum() / (weights() @ inputs().T).square().sum())


@pytest.mark.parametrize("fmt", STORED, ids=named)
def test_unclipped_it_is_minmax_to_the_bit(fmt: Format) -> None:
    w_OI = weights()
    everything = torch.full((fmt.grain.groups((12, 32))[0], 1), float("inf"))
    ours = LearntClip().apply({"bottom": everything, "top": everything}, w_OI, fmt).step
    theirs = replace(fmt, ranger=MinMax()).fit(w_OI)
    assert ours is not None
    assert torch.equal(ours.scale_G1, theirs.scale_G1)
    assert ours.fields.keys() == theirs.fields.keys()
    for name, value in theirs.fields.items():
        assert torch.equal(ours.fields[name].float(), value.float()), name


@pytest.mark.parametrize("fmt", STORED, ids=named)
def test_what_is_trained_is_what_is_decoded(fmt: Format) -> None:
    state, found = trained(fmt, steps=20)
    learnt = found.parts.finish(state.best, found.trial).formats["w"]
    tried = found.parts.apply(state.best, found.trial, 1.0).weights["w.weight"]
    codes = Nearest()(weights(), learnt, {})
    assert torch.equal(learnt.decode(codes), tried)
    assert torch.equal(learnt.load(codes.step.fields).scale_G1, codes.step.scale_G1)
    assert error(learnt.decode(codes)) == pytest.approx(state.least, rel=1e-5)


def test_it_begins_with_98_percent_of_the_range() -> None:
    """By hand: −3 … 6 on 0 … 3 is clipped to 0.982 of both ends; step 2.946, zero point at 1."""
    w_OI = torch.tensor([[-3.0, 0.0, 1.0, 6.0]])
    fmt = Format(Int(2, False), Channel(), LearntClip(), Float32())
    step = fmt.fit(w_OI)
    assert float(step.scale_G1) == pytest.approx(2.946041, abs=1e-5)  # 0.982013790 · 9 / 3
    assert step.zero_G1 is not None
    assert float(step.zero_G1) == 1.0
    assert Nearest()(w_OI, fmt, {}).codes_OI.tolist() == [[0, 1, 1, 3]]


def test_the_gradient_sees_rounding_as_the_identity() -> None:
    """By hand, on 0 … 3 with step 1 and zero point 1: inside the grid the slope in w is 1, beyond its ends 0."""
    x_GK = torch.tensor([[-2.7, -0.6, 0.2, 1.4, 5.0]], requires_grad=True)
    step = Step(torch.ones(1, 1), torch.ones(1, 1), {})
    found = straight_through(x_GK, step, Int(2, False))
    assert found.tolist() == [[-1.0, -1.0, 0.0, 1.0, 2.0]]
    found.sum().backward()
    assert x_GK.grad is not None
    assert x_GK.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("fmt", FORMATS, ids=named)
def test_training_beats_its_start_and_minmax(fmt: Format) -> None:
    state, found = trained(fmt)
    plain = replace(fmt, ranger=MinMax())
    null = error(plain.decode(plain.encode(weights())))
    assert state.least < 0.9 * state.first
    learnt = found.parts.finish(state.best, found.trial).formats["w"]
    assert error(learnt.decode(learnt.encode(weights()))) < 0.9 * null


def test_without_a_gradient_it_is_its_start() -> None:
    found = problem(FORMATS[0], attached=False)
    state = train(found, Settings(steps=40, patience=0))
    assert state.least == state.first
    start = found.parts.finish(state.best, found.trial).formats["w"]
    assert torch.equal(start.fit(weights()).scale_G1, FORMATS[0].fit(weights()).scale_G1)


def test_at_a_rate_of_zero_it_is_its_start() -> None:
    state, _ = trained(FORMATS[0], steps=20, rate=0.0)
    assert state.least == state.first


@pytest.mark.parametrize(("sign", "moved", "still"), [(1, "top", "bottom"), (-1, "bottom", "top")])
def test_each_end_is_learnt_where_it_matters(sign: int, moved: str, still: str) -> None:
    state = train(problem(FORMATS[0], w_OI=sign * weights().abs()), Settings(steps=20, patience=0))
    assert torch.equal(state.parameters[f"w › ranger › {still}"], torch.full((48, 1), 4.0))
    assert float((state.parameters[f"w › ranger › {moved}"] - 4).abs().max()) > 0.05


def test_gptq_rounds_on_the_learnt_step_and_is_better_still() -> None:
    state, found = trained(FORMATS[0])
    learnt = found.parts.finish(state.best, found.trial).formats["w"]
    x_TI = inputs() @ torch.randn(32, 32, generator=torch.Generator().manual_seed(9))  # correlated
    fed = GPTQ()(weights(), learnt, {"hessian": (x_TI.T @ x_TI).double() / len(x_TI)})
    assert learnt.step is not None
    assert torch.equal(fed.step.scale_G1, learnt.step.scale_G1)

    def miss(w_hat_OI: Tensor) -> float:
        return float(((weights() - w_hat_OI) @ x_TI.T).square().sum())

    assert miss(learnt.decode(fed)) < 0.9 * miss(learnt.decode(Nearest()(weights(), learnt, {})))


@pytest.mark.parametrize("fmt", STORED, ids=named)
def test_groups_of_zeros_and_of_tiny_values_get_finite_steps(fmt: Format) -> None:
    w_OI = torch.zeros(3, 8)
    w_OI[1] = 2.0
    w_OI[2] = -1e-38
    step = fmt.fit(w_OI)
    assert bool((step.scale_G1 > 0).all())
    assert bool(step.scale_G1.isfinite().all())
    assert bool(fmt.decode(fmt.encode(w_OI)).isfinite().all())


def test_a_recipe_cannot_give_a_negative_rate() -> None:
    with pytest.raises(RecipeError, match=r"learning rate is 0 or more, not -1"):
        parts.build("ranger", parts.read("ranger", "learnt-clip:-1"))
