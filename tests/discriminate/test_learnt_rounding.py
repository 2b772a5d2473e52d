"""Learnt rounding: without training its start to the bit, trained strictly better, and codes that are those trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.errors import RecipeError
from regauge.formats.base import Codes, Format
from regauge.formats.grains import Channel, Group
from regauge.formats.grids import Int
from regauge.formats.learnt import LearntShare, held
from regauge.formats.rangers import MinMax
from regauge.formats.scales import BFloat16, Float32
from regauge.learn.base import LearntRange, Parameters, Taught, Trial
from regauge.learn.loop import State, train
from regauge.learn.optimisers import Sign
from regauge.learn.settings import Settings
from regauge.learn.sites import on_sites
from regauge.plan import parse
from regauge.plan.contradictions import reasons_of_parts
from regauge.rounding.base import Stats
from regauge.rounding.learnt import LearntOffset
from regauge.rounding.rounders import GPTQ, Nearest
from tests.lessons import OneMatrix

FORMATS = [
    Format(Int(2, False), Group(8), LearntShare(), BFloat16()),
    Format(Int(3), Group(8), LearntShare(), BFloat16()),
    Format(Int(4, False), Channel(), LearntShare(), Float32()),
]
SIGN = Settings(steps=200, optimiser="sign", schedule="linear", patience=0)


def named(fmt: Format) -> str:
    return fmt.grid.name


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


W_OI = draws(0, 12, 32)
X_TI = draws(1, 96, 32) @ draws(2, 32, 32)  # correlated


@dataclass(frozen=True, eq=False)
class Linear(OneMatrix):
    """One matrix as a block: the error of X Ŵᵀ against X Wᵀ, in two batches."""

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        tried = self.parts.apply(parameters, self.trial, progress)
        loss = self._error(tried, self.x_TI.chunk(2)[batch])
        return loss if tried.penalty is None else loss + tried.penalty.sum()

    def error(self, parameters: Parameters) -> float:
        return float(self._error(self.parts.apply(parameters, self.trial, 1.0), self.x_TI))

    def _error(self, tried: Trial, x_TI: Tensor) -> Tensor:
        w_OI = self.trial.weights["w.weight"]
        return miss(w_OI, tried.weights["w.weight"], x_TI)


def miss(w_OI: Tensor, w_hat_OI: Tensor, x_TI: Tensor = X_TI) -> Tensor:
    found: Tensor = ((w_OI - w_hat_OI) @ x_TI.T).square().sum() / (w_OI @ x_TI.T).square().sum()
    return found


def stats(x_TI: Tensor = X_TI) -> Stats:
    return {"hessian": x_TI.T @ x_TI / len(x_TI)}


def trained(
    fmt: Format,
    rounder: LearntOffset | None = None,
    settings: Settings = SIGN,
    w_OI: Tensor = W_OI,
    x_TI: Tensor = X_TI,
    ranger: LearntRange | None = None,
) -> tuple[State, Codes, Linear]:
    """A matrix trained, the codes that come of it, and the problem."""
    taught = Taught(ranger, rounder or LearntOffset())
    problem = Linear(on_sites({"w": taught}, {"w": fmt}, {"w": stats(x_TI)}), Trial({"w.weight": w_OI}), x_TI)
    state = train(problem, settings)
    return state, problem.parts.finish(state.best, problem.trial).codes["w"], problem


def plain(fmt: Format) -> Format:
    return replace(fmt, ranger=MinMax())


@pytest.mark.parametrize("fmt", FORMATS, ids=named)
def test_at_a_rate_of_zero_it_is_nearest_on_minmax_to_the_bit(fmt: Format) -> None:
    state, codes, _ = trained(fmt, LearntOffset(rate=0.0), ranger=LearntShare(0.0))
    null = Nearest()(W_OI, plain(fmt), {})
    assert state.least == state.first
    assert torch.equal(codes.codes_OI, null.codes_OI)
    assert torch.equal(codes.step.scale_G1, null.step.scale_G1)


@pytest.mark.parametrize("fmt", FORMATS, ids=named)
@pytest.mark.parametrize(("start", "least"), [("nearest", 0.85), ("gptq", 1.0)])
def test_trained_it_beats_nearest_and_is_no_worse_than_feedback(start: str, least: float, fmt: Format) -> None:
    state, codes, _ = trained(fmt, LearntOffset(start), ranger=LearntShare())
    feedback = GPTQ(static_groups=True, order="activation")
    null = Nearest()(W_OI, plain(fmt), {}) if start == "nearest" else feedback(W_OI, plain(fmt), stats())
    assert state.first == pytest.approx(float(miss(W_OI, fmt.decode(null))), rel=1e-5)
    assert float(miss(W_OI, fmt.decode(codes))) <= least * state.first * (1 + 1e-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=named)
def test_the_codes_are_those_that_were_trained(fmt: Format) -> None:
    state, codes, problem = trained(fmt, ranger=LearntShare())
    tried = problem.parts.apply(state.best, problem.trial, 1.0).weights["w.weight"]
    assert torch.equal(fmt.decode(codes), tried)
    assert torch.equal(fmt.load(codes.step.fields).scale_G1, codes.step.scale_G1)
    assert float(miss(W_OI, fmt.decode(codes))) == pytest.approx(state.least, rel=1e-5)


def test_two_correlated_channels_are_rounded_against_each_other() -> None:
    """By hand: 0.4 and 0.3 of a step under one and the same input are 0.7 together, so one must be rounded up."""
    w_OI, x_TI = (
        torch.tensor([[0.4, 0.3, 3.0, 0.0]]),
        draws(3, 32, 1).expand(32, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0]),
    )
    fmt = Format(Int(2, False), Channel(), MinMax(), Float32())
    _, codes, _ = trained(fmt, w_OI=w_OI, x_TI=x_TI)
    assert fmt.encode(w_OI).codes_OI.tolist() == [[0, 0, 3, 0]]
    assert codes.codes_OI[0, :2].tolist() == [1, 0]
    assert float(miss(w_OI, fmt.decode(codes), x_TI)) == pytest.approx(0.183673, rel=1e-4)  # (1 − 0.7)² / 0.7²


def test_with_the_published_rate_an_offset_stays_within_half_a_step() -> None:
    state, _, _ = trained(FORMATS[0], ranger=LearntShare())
    offset = state.parameters["w › rounder › offset"]
    assert 0.3 < float(offset.abs().max()) <= 201 / 400 + 1e-5
    for end in ("bottom", "top"):
        assert float(state.parameters[f"w › ranger › {end}"].max()) <= 1 + 1 / 200 + 1e-6


def test_signed_steps_by_hand() -> None:
    parameters, state = {"v": torch.tensor([1.0, 1.0, 1.0])}, Sign().init({})
    moved, _ = Sign()(parameters, {"v": torch.tensor([-5.0, 0.0, 0.001])}, state, {"v": 0.25})
    assert moved["v"].tolist() == [1.25, 1.0, 0.75]


def test_a_share_at_its_end_can_come_back() -> None:
    x = torch.tensor([-0.01, 0.5, 1.01, 1.01, 0.0], requires_grad=True)
    found = held(x, 0, 1)
    assert found.tolist() == [0.0, 0.5, 1.0, 1.0, 0.0]
    found.backward(torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, -1.0, 0.0, 1.0, -1.0]


def test_training_the_range_too_is_better_than_the_rounding_alone() -> None:
    fmt = FORMATS[0]
    both, alone = trained(fmt, ranger=LearntShare())[0], trained(plain(fmt))[0]
    assert both.least < 0.95 * alone.least


def test_from_gptq_each_offset_is_the_least_that_gives_its_code() -> None:
    fmt = plain(FORMATS[0])
    fmt = replace(fmt, step=fmt.fit(W_OI))
    rounder = LearntOffset("gptq")
    made = rounder.init(W_OI, fmt, stats())
    codes = rounder.finish(made, W_OI, fmt)
    assert torch.equal(codes.codes_OI, rounder(W_OI, fmt, stats()).codes_OI)
    same_OI = codes.codes_OI == fmt.encode(W_OI).codes_OI
    assert int((~same_OI).sum()) > 0
    assert float(made["offset"][same_OI].abs().max()) == 0
    assert float(made["offset"].abs().max()) < 2


def test_what_it_cannot_do_is_refused() -> None:
    plan = parse("name: x\nweights: {blocks.*: {grid: nf4, grain: channel, rounder: learnt-offset}}\n")
    [reason] = reasons_of_parts(plan)
    assert reason.startswith("rounder 'learnt-offset' cannot stand beside grid 'nf4': offsets are in steps, which only")
    with pytest.raises(RecipeError, match="starts from one of nearest, gptq, not 'best'"):
        parts.build("rounder", parts.read("rounder", "learnt-offset:best"))
    with pytest.raises(RecipeError, match=r"learning rate is 0 or more, not -1"):
        parts.build("ranger", parts.read("ranger", "learnt-share:-1"))
