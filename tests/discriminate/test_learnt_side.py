"""Rounding up or down, learnt: nearest without training, strictly better with it, and every side decided in the end."""

from __future__ import annotations

import pytest
import torch

from regauge.formats.base import Format
from regauge.formats.grains import Channel, Group
from regauge.formats.grids import Int
from regauge.formats.rangers import MinMax
from regauge.formats.scales import BFloat16, Float32
from regauge.learn.base import Taught, Trial
from regauge.learn.loop import State, train
from regauge.learn.settings import Settings
from regauge.learn.sites import on_sites
from regauge.rounding.rounders import Nearest
from regauge.rounding.sides import SIDE, LearntSide
from tests.discriminate.test_learnt_rounding import W_OI, X_TI, Linear, miss

FORMATS = [Format(Int(2, False), Group(8), MinMax(), BFloat16()), Format(Int(4), Channel(), MinMax(), Float32())]
STEPS = Settings(steps=200, patience=0)


def trained(fmt: Format, rounder: LearntSide, settings: Settings = STEPS) -> tuple[State, Linear]:
    problem = Linear(on_sites({"w": Taught(None, rounder)}, {"w": fmt}), Trial({"w.weight": W_OI}), X_TI)
    return train(problem, settings), problem


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.grid.name)
def test_it_is_nearest_before_and_better_after(fmt: Format) -> None:
    state, problem = trained(fmt, LearntSide(0.0))
    null = Nearest()(W_OI, fmt, {})
    assert torch.equal(problem.parts.finish(state.best, problem.trial).codes["w"].codes_OI, null.codes_OI)
    state, problem = trained(fmt, LearntSide(0.05))
    codes = problem.parts.finish(state.best, problem.trial).codes["w"]
    assert float(miss(W_OI, fmt.decode(codes))) == pytest.approx(state.least, rel=1e-5)
    assert state.least < 0.85 * float(miss(W_OI, fmt.decode(null)))
    off = (fmt.grid.decode(codes.codes_OI) - fmt.grid.decode(null.codes_OI)).abs()
    assert float(off.max()) == 1.0  # the code on the other side, never a further one


def test_the_penalty_decides_every_side() -> None:
    fmt = FORMATS[0]
    undecided = []
    for weight in (0.0, 1.0):
        state, _ = trained(fmt, LearntSide(0.05, weight))
        (side,) = (value for name, value in state.parameters.items() if name.endswith(SIDE))
        up = (torch.sigmoid(side) * 1.2 - 0.1).clamp(0, 1)
        undecided.append(float(((up > 0.05) & (up < 0.95)).float().mean()))
    assert undecided[1] < 0.5 * undecided[0]


def test_by_hand() -> None:
    """0.4 and 0.3 of a step below and above: h is what nearest cuts off, and 1 − |2h − 1|^2 its penalty at the end."""
    fmt = Format(Int(4), Channel(), MinMax(), Float32())
    w_OI = torch.tensor([[7.0, 0.4, -2.3]])
    start = LearntSide(weight=1.0).init(w_OI, fmt, {})
    up = torch.sigmoid(start[SIDE]) * 1.2 - 0.1
    z = w_OI / fmt.fit(w_OI).scale_G1
    assert torch.allclose(up, z - z.floor(), atol=1e-6)
    found = LearntSide(weight=1.0).penalty({SIDE: torch.logit(torch.tensor([(0.25 + 0.1) / 1.2]))}, 1.0)
    assert found is not None
    assert float(found) == pytest.approx(0.75, abs=1e-5)
    assert LearntSide().penalty(start, 0.1) is None
