"""Rounding learnt at several levels: without training its start, trained better at each of them, codes as trained."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from regauge import parts
from regauge.errors import RecipeError
from regauge.formats.base import Codes, Format
from regauge.formats.grains import Group
from regauge.formats.planes import Float16Levels, level
from regauge.formats.prefixes import Nested
from regauge.formats.rangers import MinMax
from regauge.learn.base import Parameters, Taught, Trial
from regauge.learn.loop import State, train
from regauge.learn.settings import Settings
from regauge.learn.sites import on_sites
from regauge.parts import Spec
from regauge.rounding.learnt_levels import LearntLevels
from tests.lessons import OneMatrix

FMT = Format(Nested(8), Group(32), MinMax(), Float16Levels(3))


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


W_OI = draws(0, 12, 32)
X_TI = draws(1, 96, 32) @ draws(2, 32, 32)  # correlated


@dataclass(frozen=True, eq=False)
class Matrix(OneMatrix):
    """One matrix as a block: the error of X Ŵᵀ against X Wᵀ, in two batches."""

    def loss(self, parameters: Parameters, batch: int, progress: float) -> Tensor:
        tried = self.parts.apply(parameters, self.trial, progress)
        return tried.joint(lambda weights: miss(weights["w.weight"], self.x_TI.chunk(2)[batch]))

    def error(self, parameters: Parameters) -> float:
        tried = self.parts.apply(parameters, self.trial, 1.0)
        return float(tried.joint(lambda weights: miss(weights["w.weight"], self.x_TI)))


def miss(w_hat_OI: Tensor, x_TI: Tensor = X_TI) -> Tensor:
    found: Tensor = ((W_OI - w_hat_OI) @ x_TI.T).square().sum() / (W_OI @ x_TI.T).square().sum()
    return found


def trained(rounder: LearntLevels, steps: int = 60) -> tuple[State, Codes, Matrix]:
    stats = {"w": {"hessian": X_TI.T @ X_TI / len(X_TI)}}
    sites = on_sites({"w": Taught(None, rounder)}, {"w": FMT}, stats)
    problem = Matrix(sites, Trial({"w.weight": W_OI}), X_TI)
    state = train(problem, Settings(steps=steps, optimiser="sign", schedule="linear", patience=0))
    return state, sites.finish(state.best, problem.trial).codes["w"], problem


def errors(codes: Codes) -> dict[int, float]:
    found = {}
    for bits in (2, 3, 4, 8):
        own, fmt = level(codes, FMT, bits)
        found[bits] = float(miss(fmt.decode(own)))
    return found


def test_trained_at_its_levels_it_beats_where_it_began_at_each_of_them() -> None:
    state, codes, _ = trained(LearntLevels("nearest"))
    before, after = errors(LearntLevels("nearest")(W_OI, FMT, {})), errors(codes)
    assert all(after[bits] < 0.93 * before[bits] for bits in (2, 3, 4))
    assert state.least < 0.9 * state.first


def test_at_a_rate_of_zero_it_is_where_it_began_to_the_bit() -> None:
    rounder = LearntLevels(rate=0.0)
    state, codes, _ = trained(rounder, 2)
    begun = rounder(W_OI, FMT, {"hessian": X_TI.T @ X_TI / len(X_TI)})
    assert state.least == state.first
    assert torch.equal(codes.codes_OI, begun.codes_OI)
    assert torch.equal(codes.step.fields["levels"], begun.step.fields["levels"])


def test_codes_and_steps_are_those_that_were_trained() -> None:
    state, codes, problem = trained(LearntLevels("nearest"), 20)
    tried = problem.parts.apply(state.best, problem.trial, 1.0)
    assert set(tried.levels) == {4, 3, 2}
    for bits, weights in {8: tried.weights, **tried.levels}.items():
        own, fmt = level(codes, FMT, bits)
        assert torch.equal(fmt.decode(own), weights["w.weight"]), bits


def test_what_it_cannot_do_is_refused() -> None:
    for options, why in (
        ({"start": "best"}, "starts from one of nearest, gptq-levels, not 'best'"),
        ({"levels": "4/1"}, "levels are bits from 2 on, like 4/3/2, not '4/1'"),
        ({"levels": "\u00b2/3"}, "levels are bits from 2 on, like 4/3/2, not"),
        ({"reach": 0.0}, "the reach is above 0, not 0"),
    ):
        with pytest.raises(RecipeError, match=why):
            parts.build("rounder", Spec("learnt-levels", tuple(options.items())))
